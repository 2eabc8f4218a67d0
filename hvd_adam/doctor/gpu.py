"""Checks of one rank's GPU software: the NVIDIA driver and NCCL."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.doctor.machine import loaded_libraries
from hvd_adam.doctor.report import Check, fail, ok, one_line, warn
from hvd_adam.errors import UserError


def check_driver(torch: ModuleType) -> Check:
    """Checks the driver of this host through the imported `torch`."""
    version = Path("/proc/driver/nvidia/version")
    text = version.read_text() if version.exists() else ""
    number = re.search(r"\d+\.\d+(\.\d+)*", text)
    usable, reason = torch.cuda.is_available(), ""
    if torch.version.cuda and number and not usable:
        try:
            torch.cuda.init()
        except Exception as error:
            reason = one_line(error)
    return driver(number[0] if number else "", torch.version.cuda, usable, reason)


def driver(number: str, cuda: str | None, usable: bool, reason: str) -> Check:
    """Checks that torch can use the GPU driver.

    Args:
        number: version of the driver; "" if there is none.
        cuda: CUDA version that torch was built for; None for a CPU build.
        usable: whether torch finds a usable GPU.
        reason: why it does not.
    """
    if not number:
        return ok("driver", "no NVIDIA driver: CPU only" if not usable else "NVIDIA, version unknown")
    if cuda is None:
        remedy = f"install a CUDA build of torch, then run `{BUILD_COMMAND} --cuda`; or train with --device cpu"
        return warn("driver", f"NVIDIA {number}, but torch is a CPU build", remedy)
    if not usable:
        found = f"NVIDIA {number}, but torch (CUDA {cuda}) cannot use it: {reason or 'no GPU visible'}"
        remedy = "update the driver, install a torch built for its CUDA version, or check CUDA_VISIBLE_DEVICES"
        return fail("driver", found, remedy)
    return ok("driver", f"NVIDIA {number}, torch built for CUDA {cuda}")


def check_nccl(torch: ModuleType) -> Check:
    """Checks the NCCL that Horovod uses on GPUs."""
    if torch.version.cuda is None:
        return ok("NCCL", "not needed: torch is a CPU build")
    try:
        hvd = horovod()
    except UserError:
        return warn("NCCL", "unknown: Horovod does not load", "see the check of Horovod")
    if not hvd.nccl_built():
        if not torch.cuda.is_available():
            return ok("NCCL", "not built in, and no GPU here")
        found = "Horovod was built without NCCL: GPU tensors are reduced through host memory"
        return warn("NCCL", found, f"rebuild Horovod: `{BUILD_COMMAND} --cuda`")
    loaded = loaded_libraries("libnccl.so")
    if len(loaded) > 1:
        found = f"two NCCL libraries are loaded: {', '.join(loaded)}"
        return warn("NCCL", found, f"rebuild Horovod: `{BUILD_COMMAND} --cuda`")
    return ok("NCCL", f"built in, {', '.join(loaded) or 'linked statically'}")
