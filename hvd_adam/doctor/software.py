"""What a rank sees of its software: torch, torchvision, Horovod, MPI, and a hash of our own code.

It loads all of them, in the worker's process: any of them may crash it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.distributed.placement import visible_gpus
from hvd_adam.doctor import gpu, machine
from hvd_adam.doctor.checks import Check, Report, brief, fail, look, ok, sentence, warn
from hvd_adam.doctor.gather import mpi
from hvd_adam.errors import UserError

PACKAGE = Path(__file__).parents[1]
BUILD = f"build it with `{BUILD_COMMAND}`"


def examine(report: Report, controller: str, first: bool) -> None:
    """Adds to a report what the software shows.

    Args:
        report: of this rank.
        controller: what starts the ranks, "mpi" or "gloo"; "" without a launcher.
        first: whether it is this report that others are compared with.
    """
    report.versions |= {
        "Python": platform.python_version(),
        "numpy": _installed("numpy"),
        "Horovod": _installed("horovod"),
        "hvd_adam": _installed("hvd_adam"),
        "code hash": code_hash(PACKAGE),
    }
    try:
        import torch
    except Exception as error:
        report.versions["torch"] = _installed("torch")
        report.checks.append(fail("torch", f"cannot be imported: {brief(error)}", f"`{BUILD_COMMAND}`"))
        report.checks.append(look("MPI", lambda: _mpi(report, controller)))
        return
    report.versions["torch"] = torch.__version__
    report.checks += [
        look("torch", lambda: torch_release(torch.__version__)),
        look("torchvision", lambda: _torchvision(report, first)),
        look("Horovod", lambda: _horovod(torch, controller)),
        look("MPI", lambda: _mpi(report, controller)),
        look("driver", lambda: gpu.look_at_driver(torch)),
        look("NCCL", lambda: gpu.look_at_nccl(torch)),
    ]
    report.facts["gpus"] = visible_gpus()


def stops_horovod(checks: Mapping[str, str]) -> bool:
    """Whether Horovod cannot be started, by the statuses of a rank's checks by name."""
    return any(checks.get(name) == "fail" for name in ("torch", "Horovod"))


def code_hash(folder: Path) -> str:
    """A hash over all that is ours in the package; equal where the same code runs."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".rules")):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def torch_release(version: str) -> Check:
    """Judges the version of torch."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < (2, 1):
        return fail("torch", f"{version} is too old", f"install torch 2.1 or newer, then `{BUILD_COMMAND}`")
    return ok("torch", version)


def _torchvision(report: Report, first: bool) -> Check:
    version = report.versions["torchvision"] = _installed("torchvision")
    if (
        report.rank == 0
    ):  # the others must have the same: `versions`; to import it everywhere takes as long as torch
        from hvd_adam.models.torchvision_compat import (
            import_torchvision,  # here: it needs a torch that can be imported
        )

        try:
            import_torchvision()
        except UserError as error:
            return warn("torchvision", *str(error).rsplit(": ", 1))  # only its own models need it
    return torchvision_release(version, report.versions["torch"])


def torchvision_release(version: str, torch: str) -> Check:
    """Judges whether a torchvision goes with a torch: 0.(N+15) does with 2.N."""
    major, minor = (int(part) for part in re.findall(r"\d+", torch)[:2])
    wanted = f"0.{minor + 15}"
    if major == 2 and not version.startswith(f"{wanted}."):
        found = f"{version}, but {wanted} goes with torch {torch}"
        return warn("torchvision", found, f"`pip install --no-deps torchvision=={wanted}.*`")
    return ok("torchvision", version)


def _horovod(torch: ModuleType, controller: str) -> Check:
    spec = importlib.util.find_spec("horovod")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    try:
        hvd = horovod()
    except UserError as error:
        check = sentence("Horovod", str(error))
        if folder and (other := other_abi(folder, torch._C._GLIBCXX_USE_CXX11_ABI)):
            return fail(check.name, f"{check.found}; {other}", check.remedy)
        return check
    built = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, f"{name}_built")()]
    found = f"{_installed('horovod')} for torch {torch.__version__}, with {', '.join(built) or 'nothing'}"
    if controller and controller not in built:
        return fail("Horovod", f"{found}, but the launcher uses {controller}", BUILD)
    if "mpi" not in built:
        return warn("Horovod", f"{found}: not for mpirun and srun", f"use horovodrun --gloo, or {BUILD}")
    return ok("Horovod", f"{found}, C++11 ABI {'yes' if torch._C._GLIBCXX_USE_CXX11_ABI else 'no'}")


def other_abi(horovod: Path, torch_has_new: bool) -> str:
    """Says how the C++ ABI of a Horovod differs from torch's; "" where it does not, or there is no library.

    Args:
        horovod: its folder.
        torch_has_new: whether torch has strings of the C++11 ABI in its interfaces.
    """
    for library in (horovod / "torch").glob("mpi_lib_v2*.so"):
        # With the other ABI no symbol of the library names this type.
        has_new = b"St7__cxx1112basic_string" in library.read_bytes()
        if has_new != torch_has_new:
            return f"it has the {'new' if has_new else 'old'} C++ ABI, torch the {'old' if has_new else 'new'} one"
    return ""


def _mpi(report: Report, controller: str) -> Check:
    if controller == "gloo" and importlib.util.find_spec("mpi4py") is None:
        return ok("MPI", "not used: the launcher uses Gloo")
    try:
        library = " ".join(mpi().Get_library_version().split(",")[0].split())
    except Exception as error:
        found = f"mpi4py cannot be imported: {brief(error)}"
        remedy = f"load the MPI that Horovod was built with, or {BUILD}"
        return (fail if controller == "mpi" else warn)("MPI", found, remedy)
    report.versions["MPI"] = library
    loaded = machine.loaded_libraries("libmpi.so")
    if len(loaded) > 1:
        return fail(
            "MPI", f"Horovod and mpi4py use two MPIs: {', '.join(loaded)}", f"build both: `{BUILD_COMMAND}`"
        )
    return mpi_and_mpirun(library, _mpirun_version())


def _mpirun_version() -> str:
    if shutil.which("mpirun") is None:
        return ""
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, check=False)
    return next(iter(done.stdout.splitlines()), "")


def mpi_and_mpirun(library: str, mpirun: str) -> Check:
    """Judges whether the mpirun on PATH belongs to the MPI library.

    Args:
        library: as in "Open MPI v4.1.4".
        mpirun: the first line of its --version; "" if there is none.
    """
    if not mpirun:
        return warn(
            "MPI", f"{library}, but no mpirun on PATH", "load your cluster's MPI module, or use srun or Gloo"
        )
    found, numbers = re.search(r"\d+\.\d+(\.\d+)?", library), re.search(r"\d+\.\d+(\.\d+)?", mpirun)
    if ("Open MPI" in library) != ("Open MPI" in mpirun) or (found and numbers and found[0] != numbers[0]):
        remedy = f"put the mpirun of {library} first on PATH on all hosts, or rebuild: `{BUILD_COMMAND}`"
        return warn("MPI", f"the library is {library}, but mpirun on PATH is {mpirun}", remedy)
    return ok("MPI", f"{library}, and its mpirun")


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
