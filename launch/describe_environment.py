"""Prints the versions and places of what the set-up installed, one a line, without importing any of it.

setup.sh compares the text with that of its last successful run. Run with ``python -I``.
"""

import contextlib
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path


def requirements() -> list[str]:
    """Names of the project and of what it asks for directly, the development extra included."""
    names = {"hvd_adam", "torch", "torchvision", "horovod", "mpi4py"}
    with contextlib.suppress(PackageNotFoundError):
        names |= {re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requires("hvd_adam") or []}
    return sorted(names)


def describe(name: str) -> str:
    """One line: version, place, and for compiled extensions of Horovod's kind their sizes and times."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return f"{name} missing"
    record = Path(str(found.locate_file("")))
    libraries = sorted(record.glob("horovod/torch/mpi_lib_v2*.so")) if name == "horovod" else []
    traces = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in libraries]
    version_file = record / name / "version.py"
    # torch's own file tells a CPU build from a CUDA build of the same version.
    details = version_file.read_text() if name == "torch" and version_file.exists() else ""
    return " ".join([name, found.version, str(record), *traces, details.replace("\n", " ")])


if __name__ == "__main__":
    print(sys.version, sys.prefix)
    for requirement in requirements():
        print(describe(requirement))
