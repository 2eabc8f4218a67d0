"""Crash-safe files: atomic writes, fsync and checksums. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# The answers of file systems that cannot flush a folder, such as CIFS and the shared folders of VirtualBox.
FOLDER_FLUSH_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file's content. After a crash the file has its old or its new content, never a part.

    Raises:
        OSError: the file cannot be written; the old content is unchanged.
    """
    publish(write_draft(path, content), path)


def write_draft(path: Path, content: str | bytes) -> Path:
    """Writes the future content of a file next to it and returns the draft, which `publish` renames.

    Raises:
        OSError: the draft cannot be written.
    """
    draft = path.with_name(f".{path.name}.new")
    if isinstance(content, bytes):
        draft.write_bytes(content)
    else:
        draft.write_text(content)
    fsync(draft)
    return draft


def publish(draft: Path, path: Path) -> None:
    """Renames a draft to its final path, and flushes the folder's entries to disk."""
    draft.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flushes a file's data, or a folder's entries, to disk; a folder only where its file system can.

    Raises:
        OSError: the flush has failed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in FOLDER_FLUSH_UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def errors_of_writes() -> Iterator[None]:
    """Raises what a write to a file has raised, where PyTorch raises an error about its archive instead.

    That one hides a full disk's OSError, Ctrl-C, and the SystemExit of a signal handler.
    """
    handled = sys.exc_info()[1]  # by the caller: a context, too
    try:
        yield
    except Exception as error:
        cause = error.__context__
        if cause is None or cause is handled or (isinstance(cause, Exception) and not isinstance(cause, OSError)):
            raise
        raise cause from None


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class HashingFile:
    """A binary file that is hashed while it is written: reading it again would take as long as writing it.

    Attributes:
        digest: SHA-256 of the bytes written so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes and hashes `data`; returns the number of bytes written."""
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flushes the file's buffer."""
        self._file.flush()
