"""The cache of compiled kernels on this host, so that its ranks compile each kernel once.

Only this user can write to the directory, since its files are executed. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

# A compiler takes seconds, on a slow file system perhaps a minute; one that hangs must not hang the job.
COMPILE_SECONDS = 300
LOCK_SECONDS = 2 * COMPILE_SECONDS  # one process may compile several kernels before this one has its turn


def cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """Returns a compiled library from this host's cache; one process of the host builds it, the others wait.

    A file that is damaged, or that a killed process has left, is built again.

    Args:
        name: of the library, part of a file name.
        recipe: everything that the result depends on, but the host.
        build: writes the library to a path.

    Raises:
        RuntimeError: another process builds for longer than `LOCK_SECONDS`; or what `build` raises.
    """
    directory = cache_dir()
    library = directory / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if _is_whole(library):
        return library
    with _locked(directory / "lock"):
        if not _is_whole(library):
            for left in directory.glob("*.partial"):
                left.unlink()
            partial = library.with_suffix(".partial")
            build(partial)
            _digest_file(library).write_text(_digest(partial))
            partial.replace(library)
    return library


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path, timeout=LOCK_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another process has held {path} for {LOCK_SECONDS} s: end it, and try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _is_whole(library: Path) -> bool:
    try:
        return _digest_file(library).read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def cache_dir() -> Path:
    """Returns the directory for this kind of host: machine code for one may not run on another."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_adam" / "kernels"
        directory = root / f"{'-'.join(filter(None, platform.libc_ver()))}-{_processor()}"
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
