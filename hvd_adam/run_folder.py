"""The run folder: one job at a time writes to it, and where its run began."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from hvd_adam.errors import Preempted, UserError
from hvd_adam.metrics import METRICS_FILE
from hvd_adam.preemption import asked_to_stop

LOCK_FILE = ".lock"

# Ranks whose launcher was killed live on for less than 30 s.
WAIT_SECONDS = 60.0

# A POSIX lock ends with the first descriptor of its file that the process closes: these stay open.
_claimed: dict[Path, IO[str]] = {}


def claim(folder: Path, *, wait: bool = True) -> None:
    """Keeps other jobs out of a run folder until this process ends, in whatever way it ends; rank 0 calls it.

    Waits for the job that is in it, and says so; or, without `wait`, leaves the folder to it. The lock is POSIX's, on
    a file that stays: NFS has it too, and processes that this one forks do not. What the process has claimed it may
    claim again.

    Args:
        folder: it must exist.

    Raises:
        UserError: the other job is still there after `WAIT_SECONDS`.
        Preempted: this one was asked to stop while it waited.
        OSError: the folder cannot be written to.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _claimed:
        return
    file = path.open("a+")
    deadline = None
    while not _lock(file, folder):
        if not wait:
            file.close()
            return
        file.seek(0)
        other = file.read().strip() or "which is only just starting"
        if deadline is None:
            deadline = time.monotonic() + WAIT_SECONDS
            _say(f"waits up to {WAIT_SECONDS:g} s for another job in {folder}: {other}")
        if asked_to_stop():
            raise Preempted
        if time.monotonic() > deadline:
            raise UserError(f"another job writes to {folder}, {other}: end it, or choose another --output-dir")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _claimed[path] = file


def _lock(file: IO[str], folder: Path) -> bool:
    """Whether nobody else has the lock; it is this process's then."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _say(f"warning: {folder} lies where files cannot be locked: let no other job write to it")
    return True


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")  # in one write: launchers tag each write with the rank
    sys.stdout.flush()


def is_taken(folder: Path) -> bool:
    """Whether a run has begun in it."""
    metrics = folder / METRICS_FILE
    return metrics.exists() and metrics.stat().st_size > 0


def origin(folder: Path) -> Path | None:
    """The checkpoint from elsewhere that its run began from (`--resume PATH`); None if it began anew."""
    with (folder / METRICS_FILE).open() as lines:
        try:
            first = json.loads(lines.readline())
        except ValueError:
            return None  # as a killed process leaves it
    return Path(first["path"]) if first["event"] == "resume" else None
