"""The run folder: one job at a time writes to it; where its run began, and where it goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import yaml

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.config import TrainConfig
from hvd_adam.errors import Preempted, UserError
from hvd_adam.recovery.preemption import stop_requested
from hvd_adam.training.run_log import METRICS_FILE

LOCK_FILE = ".lock"

# Ranks whose launcher was killed live on for less than 30 s.
WAIT_SECONDS = 60.0

# A POSIX lock ends with the first descriptor of its file that the process closes: these stay open.
_claimed: dict[Path, IO[str]] = {}


def claim(folder: Path, *, wait: bool = True) -> None:
    """Keeps other jobs out of a run folder until this process ends, in whatever way it ends; rank 0 calls it.

    Waits for the job that is in it, and says so; or, without `wait`, leaves the folder to it. The lock is POSIX's,
    on a file that stays: NFS has it too, and processes that this one forks do not. What the process has claimed it
    may claim again.

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
        if stop_requested():
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


@dataclass(frozen=True)
class Start:
    """Where a run goes on.

    Attributes:
        path: the checkpoint's folder, or "memory".
        state: what is in it; None once it has been taken up.
        damaged: what is wrong with newer ones.
    """

    path: Path | str
    state: TrainingState | None
    damaged: list[str]


def open_for(config: TrainConfig, size: int, known: TrainingState | None) -> tuple[Path, Start | None]:
    """A run's folder, claimed, with the configuration in it; and where the run goes on, None for a new one.

    Args:
        config: of the run.
        size: number of ranks.
        known: the state in memory from which to go on, instead of a checkpoint.

    Raises:
        UserError: the folder cannot be written to, or holds another run, or another job does; or the checkpoint to
            go on from cannot be read, or is of another run.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.dataset}-{config.model}".replace(":", ".")
    folder = Path(config.output_dir or Path("runs") / name)
    try:
        batch = None if config.elastic else config.global_batch(size)
        start = None if known is None else Start("memory", known, [])
        if start is None and not folder.exists():
            start = _start(config, folder, batch)  # one that fails makes no folder
        folder.mkdir(parents=True, exist_ok=True)
        # Of this job's ranks the one that had it may be cut off, and not yet have ended.
        claim(folder, wait=known is None)
        if start is None or (known is None and is_taken(folder)):
            start = _start(config, folder, batch)
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        storage.write_atomically(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder} ({error.strerror}): choose another --output-dir"
        ) from None
    return folder, start


def _start(config: TrainConfig, folder: Path, global_batch_size: int | None) -> Start | None:
    """What `--resume` finds; None for a new run."""
    given = None if config.resume in ("auto", "never") else Path(os.path.abspath(config.resume))
    path, saved, damaged = None, {}, []
    if is_taken(folder):
        began_from = origin(folder)
        if config.resume == "never":
            raise UserError(f"{folder} holds a run already: choose another --output-dir, or remove it")
        if given not in (None, began_from):
            raise UserError(
                f"{folder} holds a run that did not begin from {config.resume}: choose another --output-dir, or "
                "--resume auto to go on with it"
            )
        path, saved, damaged = storage.newest(folder / "checkpoints")
        if damaged and path is None:
            raise UserError(f"no checkpoint of {folder} is whole: {damaged[0]}")
        given = began_from
    if path is None and given is not None:
        path, saved = given, storage.load(given)
    if path is None:
        return None  # new, or killed before it wrote one
    state = TrainingState.of(saved, str(path))
    state.require_same_run(asdict(config), global_batch_size, str(path))
    return Start(path, state, damaged)
