"""Where compiled kernels are kept between runs, so that the ranks of a host compile each kernel once.

The folder belongs to this user alone: what lies in it is executed. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Keeps what `torch.compile` makes inside in this host's cache; the first process here to come compiles.

    The others of the host wait for it, then all read what it has made at once. What a process that was killed
    while it compiled has left behind is thrown away.

    Args:
        name: says which kernel, alike in all processes; a file name.
    """
    folder = _folder()
    made, begun = folder / f"{name}.made", folder / "begun"
    lock = FileLock(folder / "lock")
    with lock:
        if begun.exists():
            _empty(folder)
        first = not made.exists()
        if first:
            begun.touch()
            with _inductor_cache(folder):
                yield
            made.touch()
            begun.unlink(missing_ok=True)
    if not first:
        with _inductor_cache(folder):
            yield


def discard() -> None:
    """Throws away every kernel in this host's cache."""
    folder = _folder()
    with FileLock(folder / "lock"):
        _empty(folder)


@cache
def _folder() -> Path:
    """One folder for each kind of host: machine code for one processor may not run on another."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_adam" / "kernels"
        folder = root / f"torch{torch.__version__}-{platform.python_version()}-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # no home, or none that can be written to: this process compiles for itself
        return Path(tempfile.mkdtemp(prefix="hvd_adam-kernels-"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


@contextmanager
def _inductor_cache(folder: Path) -> Iterator[None]:
    """Lets PyTorch's compiler read and write the folder, and none that the user's own kernels lie in."""
    from torch._inductor import config  # here: it takes a second to import

    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(folder / "inductor")
    # Compiling in this process: a pool of others is slower for one kernel, and would outlive an MPI rank.
    alone = config.patch(compile_threads=1) if hasattr(config, "compile_threads") else nullcontext()
    try:
        with alone:
            yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before
