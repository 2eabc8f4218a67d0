"""Print versions and paths of the installed packages, one per line, without importing any of them.

setup.sh compares the output with that of its last successful run. Run this file with ``python -I``.
"""

import contextlib
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path


def requirement_names() -> list[str]:
    """Returns the names of the project and of its direct requirements, those of all extras included."""
    names = {"hvd_adam", "torch", "torchvision", "horovod", "mpi4py"}
    with contextlib.suppress(PackageNotFoundError):
        names |= {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("hvd_adam") or []}
    return sorted(names)


def describe(name: str) -> str:
    """Returns one line: version, folder, and for Horovod the sizes and times of its compiled libraries."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return f"{name} missing"
    folder = Path(str(found.locate_file("")))
    libraries = sorted(folder.glob("horovod/torch/mpi_lib_v2*.so")) if name == "horovod" else []
    stats = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in libraries]
    # This file of torch distinguishes a CPU build from a CUDA build of the same version.
    version_file = folder / name / "version.py"
    details = version_file.read_text() if name == "torch" and version_file.exists() else ""
    return " ".join([name, found.version, str(folder), *stats, details.replace("\n", " ")])


if __name__ == "__main__":
    print(sys.version, sys.prefix)
    for requirement in requirement_names():
        print(describe(requirement))
