"""The files that options such as `--output` name: checked first, then written whole or not at all.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hvd_adam.checkpoint.files import fsync, publish
from hvd_adam.errors import UserError


def require_free(option: str, path: Path, *, replace: bool) -> None:
    """Checks that a file may be written, before the work of which it is the result.

    Args:
        option: that names the file.
        path: of the file.
        replace: whether it may exist.

    Raises:
        UserError: the path is a folder or a device, its folder does not exist, or the file exists.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: give the name of a file in it")
        if not path.parent.is_dir():
            raise UserError(f"{option} {path}: there is no folder {path.parent}: make it first")
        if path.exists() and not replace:
            raise UserError(f"{option} {path} exists: choose another name, or replace it with --force")
        if path.exists() and not path.is_file():  # such as /dev/null, which the result would take the place of
            raise UserError(f"{option} {path} is not a regular file: choose another name")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"{option} {path} cannot be written ({error.strerror})") from None


@contextmanager
def whole_file(option: str, path: Path) -> Iterator[Path]:
    """Yields a path to write to. At the end the file there gets its name; without one, nothing is left.

    The path is in a new folder next to the file, so several processes may write to one name: the last one wins.
    SIGTERM and SIGHUP end the process as elsewhere, but remove the folder first.

    Args:
        option: that names the file.
        path: of the file; an existing one is replaced.

    Raises:
        UserError: the file cannot be written. An existing one is unchanged.
    """
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".hvd_adam-", dir=path.parent) as folder,
            _removed_at_signals(folder),
        ):
            draft = Path(folder) / path.name
            yield draft
            fsync(draft)
            publish(draft, path)
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror or error})") from None


@contextmanager
def _removed_at_signals(folder: str) -> Iterator[None]:
    """Lets signals that end a process at once remove a folder first.

    An exception instead of the signal could be lost in a library, as in the import of a compiled module.
    """

    def end(number: int, _: object) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP) if in_main else ()
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in changed:
            signal.signal(number, end)
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
