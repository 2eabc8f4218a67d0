"""What a rank sees of GPUs: driver, NCCL, and which ones."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.doctor.checks import Check, brief, fail, ok, warn
from hvd_adam.doctor.machine import loaded_libraries
from hvd_adam.errors import UserError


def look_at_driver(torch: ModuleType) -> Check:
    """Judges the driver of this host, by way of a torch that is loaded."""
    version = Path("/proc/driver/nvidia/version")
    text = version.read_text() if version.exists() else ""
    number = re.search(r"\d+\.\d+(\.\d+)*", text)
    usable, reason = torch.cuda.is_available(), ""
    if torch.version.cuda and number and not usable:
        try:
            torch.cuda.init()
        except Exception as error:
            reason = brief(error)
    return driver(number[0] if number else "", torch.version.cuda, usable, reason)


def driver(number: str, cuda: str | None, usable: bool, reason: str) -> Check:
    """Judges the GPU driver.

    Args:
        number: its version; "" without one.
        cuda: the CUDA that torch is built for, if it is.
        usable: whether torch finds a GPU that it can use.
        reason: why not.
    """
    if not number:
        return ok("driver", "no NVIDIA driver: CPUs only" if not usable else "there, of unknown version")
    if cuda is None:
        remedy = f"install a CUDA build of torch, then `{BUILD_COMMAND} --cuda`; or train with --device cpu"
        return warn("driver", f"NVIDIA {number}, but torch is a CPU build", remedy)
    if not usable:
        found = f"NVIDIA {number}, but torch (CUDA {cuda}) cannot use it: {reason or 'no GPU visible'}"
        return fail(
            "driver", found, "update the driver, install a torch for its CUDA, or see CUDA_VISIBLE_DEVICES"
        )
    return ok("driver", f"NVIDIA {number}, torch for CUDA {cuda}")


def look_at_nccl(torch: ModuleType) -> Check:
    """Judges the NCCL that Horovod uses, where GPUs are."""
    if torch.version.cuda is None:
        return ok("NCCL", "not needed: torch is a CPU build")
    try:
        hvd = horovod()
    except UserError:
        return warn("NCCL", "not known: Horovod does not load", "see Horovod above")
    if not hvd.nccl_built():
        if not torch.cuda.is_available():
            return ok("NCCL", "not built, and no GPU here")
        return warn(
            "NCCL", "Horovod is built without it: GPUs sum by way of the host", f"`{BUILD_COMMAND} --cuda`"
        )
    loaded = loaded_libraries("libnccl.so")
    if len(loaded) > 1:
        return warn("NCCL", f"two are loaded: {', '.join(loaded)}", f"rebuild: `{BUILD_COMMAND} --cuda`")
    return ok("NCCL", f"built in, {', '.join(loaded) or 'linked statically'}")
