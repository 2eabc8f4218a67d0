"""Files that are appended to during a run and survive a full disk: text lines and TensorBoard events."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


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


class ScalarLog(AppendLog):
    """Scalars for TensorBoard, written at once. TensorBoard's own writer uses a thread, which a full disk ends.

    Args:
        folder: the folder in which TensorBoard looks for event files.
        first_step: TensorBoard discards points of earlier files from this step on.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported here: it takes a second, and only rank 0 needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}")
        self._event, self._summary, self._writer = Event, Summary, RecordWriter(self)
        self._write_event(first_step, file_version="brain.Event:2")
        self._write_event(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Adds a point to the curve `name`."""
        self._write_event(step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def _write_event(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())
