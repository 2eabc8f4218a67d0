"""Checks of one rank's software: packages, torch, torchvision, Horovod, MPI, and a hash of this package's code.

It imports them, which is why it runs in the worker's process: each of them may crash it.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import BUILD_COMMAND, SETUP_COMMAND
from hvd_adam.distributed.placement import visible_gpus
from hvd_adam.doctor import gpu, machine
from hvd_adam.doctor.gather import mpi
from hvd_adam.doctor.report import (
    INSTALL_COMMAND,
    OK,
    Check,
    Report,
    attempt,
    fail,
    from_error_message,
    ok,
    one_line,
    warn,
)
from hvd_adam.errors import UserError
from hvd_adam.extras import BASE, EXTRAS, extra_command
from hvd_adam.versions import code_hash, installed_version

BUILD = f"build it with `{BUILD_COMMAND}`"

# Modules with checks of their own.
CHECKED_MODULES = ("torch", "torchvision", "mpi4py")


def examine(report: Report, controller: str, first: bool) -> None:
    """Adds the checks and versions of the software to a report.

    Args:
        report: of this rank.
        controller: what connects the ranks, "mpi" or "gloo"; "" without a launcher.
        first: whether the other reports are compared with this one.
    """
    report.versions |= {
        "Python": platform.python_version(),
        "numpy": installed_version("numpy"),
        "Horovod": installed_version("horovod"),
        "hvd_adam": installed_version("hvd_adam"),
        "code hash": code_hash(),
    }
    report.checks.append(attempt("packages", lambda: packages(_missing_modules())))
    try:
        import torch
    except Exception as error:
        report.versions["torch"] = installed_version("torch")
        report.checks.append(_torch_failure(error))
        if importlib.util.find_spec("horovod") is None:
            report.checks.append(fail("Horovod", f"not installed in {sys.prefix}", BUILD))
        report.checks.append(attempt("MPI", lambda: _mpi(report, controller)))
        return
    report.versions["torch"] = torch.__version__
    report.checks += [
        attempt("torch", lambda: torch_release(torch.__version__)),
        attempt("torchvision", lambda: _torchvision(report, first)),
        attempt("Horovod", lambda: _horovod(torch, controller)),
        attempt("MPI", lambda: _mpi(report, controller)),
        attempt("driver", lambda: gpu.check_driver(torch)),
        attempt("NCCL", lambda: gpu.check_nccl(torch)),
    ]
    report.facts["gpus"] = visible_gpus()


def prevents_horovod(status_by_name: Mapping[str, str]) -> bool:
    """Returns whether Horovod cannot start on a rank, given the statuses of its checks by name."""
    return any(status_by_name.get(name) == "fail" for name in ("torch", "Horovod"))


def _missing_modules() -> list[str]:
    modules = [module for module in (*BASE, *EXTRAS) if module not in CHECKED_MODULES]
    return [module for module in modules if importlib.util.find_spec(module) is None]


def packages(missing: Iterable[str]) -> Check:
    """Checks that the dependencies of the package are installed.

    Args:
        missing: modules that cannot be found. Those of extra "train" are a warning: a script of the user's own may
            not need them.
    """
    missing = list(missing)
    if not missing:
        return ok("packages", "all installed")
    required = [module for module in missing if EXTRAS.get(module) != "train"]
    found = f"not installed: {', '.join(missing)}"
    remedies = dict.fromkeys(_install_command(module) for module in missing)
    return (fail if required else warn)("packages", found, "; ".join(remedies))


def _install_command(module: str) -> str:
    return extra_command(EXTRAS.get(module, "train"))


def _torch_failure(error: Exception) -> Check:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return fail("torch", "not installed", INSTALL_COMMAND)
    return fail("torch", f"cannot be imported: {one_line(error)}", f"reinstall torch, then `{BUILD_COMMAND}`")


def torch_release(version: str) -> Check:
    """Checks the version of torch."""
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if release < (2, 1):
        return fail("torch", f"{version} is too old", f"install torch 2.1 or newer, then `{BUILD_COMMAND}`")
    return ok("torch", version)


def _torchvision(report: Report, first: bool) -> Check:
    version = report.versions["torchvision"] = installed_version("torchvision")
    if version == "not installed":
        return warn("torchvision", version, INSTALL_COMMAND)
    release = torchvision_release(version, report.versions["torch"])
    # Rank 0 only, because the import takes as long as torch's; the check of versions covers the other ranks.
    if report.rank == 0 and release.status == OK:
        try:
            importlib.import_module("torchvision")  # as a user's script or another library does
        except Exception as error:
            return torchvision_failure(version, report.versions["torch"], error)
    return release


def torchvision_failure(version: str, torch: str, error: Exception) -> Check:
    """Reports a torchvision that cannot be imported, with the command that installs a matching build.

    Args:
        version: of torchvision.
        torch: version of torch; what follows "+" names its build, such as "cpu" or "cu124".
        error: what `import torchvision` raised.
    """
    found = f"{version} cannot be imported with torch {torch}: {one_line(error)}"
    release, _, build = torch.partition("+")
    wanted = f"'torchvision==0.{int(release.split('.')[1]) + 15}.*'"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    remedy = f"`pip install --no-deps --force-reinstall {wanted}{index}`, or `{SETUP_COMMAND}`"
    return fail("torchvision", found, remedy)


def torchvision_release(version: str, torch: str) -> Check:
    """Checks that the versions of torchvision and torch match: torchvision 0.(N+15) belongs to torch 2.N."""
    major, minor = (int(part) for part in re.findall(r"\d+", torch)[:2])
    wanted = f"0.{minor + 15}"
    if major == 2 and not version.startswith(f"{wanted}."):
        found = f"{version}, but torch {torch} needs {wanted}"
        return warn("torchvision", found, f"`pip install --no-deps torchvision=={wanted}.*`")
    return ok("torchvision", version)


def _horovod(torch: ModuleType, controller: str) -> Check:
    spec = importlib.util.find_spec("horovod")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    try:
        hvd = horovod()
    except UserError as error:
        check = from_error_message("Horovod", str(error))
        if folder and (mismatch := abi_mismatch(folder, torch._C._GLIBCXX_USE_CXX11_ABI)):
            return fail(check.name, f"{check.found}; {mismatch}", check.remedy)
        return check
    built = [name for name in ("mpi", "gloo", "nccl") if getattr(hvd, f"{name}_built")()]
    found = (
        f"{installed_version('horovod')} for torch {torch.__version__}, with {', '.join(built) or 'no controller'}"
    )
    if controller and controller not in built:
        return fail("Horovod", f"{found}, but the launcher uses {controller}", BUILD)
    if "mpi" not in built:
        return warn("Horovod", f"{found}: mpirun and srun need MPI", f"use horovodrun --gloo, or {BUILD}")
    return ok("Horovod", f"{found}, C++11 ABI {'yes' if torch._C._GLIBCXX_USE_CXX11_ABI else 'no'}")


def abi_mismatch(horovod: Path, torch_cxx11_abi: bool) -> str:
    """Describes how the C++ ABI of Horovod's library differs from torch's; "" if they match or no library exists.

    Args:
        horovod: directory of the package.
        torch_cxx11_abi: whether torch uses the C++11 ABI of libstdc++.
    """
    for library in (horovod / "torch").glob("mpi_lib_v2*.so"):
        # A library of the old ABI has no symbol with this type in its name.
        cxx11_abi = b"St7__cxx1112basic_string" in library.read_bytes()
        if cxx11_abi != torch_cxx11_abi:
            own, other = ("new", "old") if cxx11_abi else ("old", "new")
            return f"it was built with the {own} C++ ABI, torch with the {other} one"
    return ""


def _mpi(report: Report, controller: str) -> Check:
    if controller == "gloo" and importlib.util.find_spec("mpi4py") is None:
        return ok("MPI", "not used: the launcher uses Gloo")
    try:
        library = " ".join(mpi().Get_library_version().split(",")[0].split())
    except ModuleNotFoundError:
        return (fail if controller == "mpi" else warn)(
            "MPI", "mpi4py is not installed", _install_command("mpi4py")
        )
    except Exception as error:
        found = f"mpi4py cannot be imported: {one_line(error)}"
        remedy = f"load the MPI that Horovod was built with, or {BUILD}"
        return (fail if controller == "mpi" else warn)("MPI", found, remedy)
    report.versions["MPI"] = library
    loaded = machine.loaded_libraries("libmpi.so")
    if len(loaded) > 1:
        found = f"Horovod and mpi4py use different MPI libraries: {', '.join(loaded)}"
        return fail("MPI", found, f"build both with the same MPI: `{BUILD_COMMAND}`")
    return mpi_and_mpirun(library, _mpirun_version())


def _mpirun_version() -> str:
    if shutil.which("mpirun") is None:
        return ""
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, timeout=20, check=False)
    return next(iter(done.stdout.splitlines()), "")


def mpi_and_mpirun(library: str, mpirun: str) -> Check:
    """Checks that the mpirun on PATH belongs to the MPI library.

    Args:
        library: as in "Open MPI v4.1.4".
        mpirun: first line of `mpirun --version`; "" if there is no mpirun.
    """
    if not mpirun:
        remedy = "load your cluster's MPI module, or use srun or Gloo"
        return warn("MPI", f"{library}, but no mpirun on PATH", remedy)
    found, numbers = re.search(r"\d+\.\d+(\.\d+)?", library), re.search(r"\d+\.\d+(\.\d+)?", mpirun)
    if ("Open MPI" in library) != ("Open MPI" in mpirun) or (found and numbers and found[0] != numbers[0]):
        remedy = f"put the mpirun of {library} first on PATH on all hosts, or rebuild: `{BUILD_COMMAND}`"
        return warn("MPI", f"the library is {library}, but mpirun on PATH is {mpirun}", remedy)
    return ok("MPI", f"{library}, with a matching mpirun")
