"""The cache of compiled kernels on this host, so that its ranks compile each kernel once.

Only this user can write to the directory, since its files are executed. It may be deleted at any time.
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
from typing import Any

import torch
from filelock import FileLock

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# Functions of PyTorch's compiler that in some releases (2.1) remember the first directory for the whole process.
_REMEMBER_DIRECTORY = ("cache_dir", "cpp_prefix_path")


@contextmanager
def host_cache(name: str) -> Iterator[None]:
    """Makes `torch.compile` use this host's cache in the body of the `with` statement.

    The first process of the host compiles. The others wait for it and then read its files concurrently. Files of a
    process that was killed while it compiled are deleted.

    Args:
        name: of the kernel, identical in all processes; part of a file name.
    """
    directory = cache_dir()
    made, begun = directory / f"{name}.made", directory / "begun"
    lock = FileLock(directory / "lock")
    with lock:
        if begun.exists():
            _empty(directory)
        first = not made.exists()
        if first:
            begun.touch()
            with _inductor_cache(directory):
                yield
            made.touch()
            begun.unlink(missing_ok=True)
    if not first:
        with _inductor_cache(directory):
            yield


def clear_cache() -> None:
    """Deletes every kernel in this host's cache."""
    directory = cache_dir()
    with FileLock(directory / "lock"):
        _empty(directory)


@cache
def cache_dir() -> Path:
    """Returns the directory for this kind of host: machine code for one processor may not run on another."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_adam" / "kernels"
        directory = root / f"torch{torch.__version__}-{platform.python_version()}-{_processor()}"
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except (OSError, RuntimeError):  # no home directory, or not writable: this process compiles for itself
        return Path(tempfile.mkdtemp(prefix="hvd_adam-kernels-"))


def _processor() -> str:
    """Returns architecture and a hash of the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


@contextmanager
def _inductor_cache(directory: Path) -> Iterator[None]:
    """Makes PyTorch's compiler use this directory, not the one of the user's own kernels."""
    from torch._inductor import codecache, config  # here, since importing them takes a second

    def forget_directory() -> None:
        for name in _REMEMBER_DIRECTORY:
            function: Any = getattr(codecache, name, None)
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(directory / "inductor")
    forget_directory()
    # Compile in this process: a pool of others is slower for one kernel, and would outlive an MPI rank.
    single_process = config.patch(compile_threads=1) if hasattr(config, "compile_threads") else nullcontext()
    try:
        with single_process:
            yield
    finally:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before
        forget_directory()
