"""Files that grow by whole records while a run lasts, and outlast a full disk: lines, and TensorBoard's events."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


class AppendLog:
    """A file that is appended to. What the disk does not take waits in memory, and goes before the next record.

    Args:
        path: the file; made if it is not there.

    Attributes:
        error: why records wait; None where none do.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self.error: OSError | None = None

    def write(self, record: bytes) -> None:
        """Appends a record as soon as the disk takes it."""
        self._waiting += record
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self.error = None
        except OSError as error:
            self.error = error

    def close(self) -> None:
        """Tries once more, and gives up what still waits."""
        self.write(b"")
        self._file.close()


class ScalarLog(AppendLog):
    """Numbers for TensorBoard, written at once: its own writer does it in a thread, which a full disk ends.

    Args:
        folder: where TensorBoard looks for files of events.
        first_step: of this and later steps TensorBoard forgets what earlier files hold.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # A second to import; rank 0 alone needs them.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        super().__init__(folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}")
        self._event, self._summary, self._writer = Event, Summary, RecordWriter(self)
        self._add(first_step, file_version="brain.Event:2")
        self._add(first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Adds a point to the curve of that name."""
        self._add(step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def _add(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())
