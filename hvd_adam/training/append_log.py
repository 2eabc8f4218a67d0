"""`AppendLog`: a file that is appended to during a run and survives a full disk."""

from __future__ import annotations

from pathlib import Path


class AppendLog:
    """An append-only file. Records that the disk does not accept stay in memory until a later write.

    Args:
        path: the file; created if it does not exist.

    Attributes:
        error: why records are held in memory; None if all are written.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self.error: OSError | None = None

    def write(self, record: bytes) -> None:
        """Appends a record, after the records that are still in memory."""
        self._pending += record
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            self.error = None
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Tries once more to write the records in memory, then closes the file."""
        self.write(b"")
        self._file.close()
