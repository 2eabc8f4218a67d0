"""Files that are there whole or not at all: atomic writes, fsync and checksums. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it has its old or its new content at any time, even after a crash.

    Raises:
        OSError: it cannot be written; the old content is there.
    """
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text)
    fsync(draft)
    draft.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class HashingFile:
    """A file that is hashed as it is written: reading it again would take as long as writing it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes and hashes `data`."""
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flushes the file's buffer."""
        self._file.flush()
