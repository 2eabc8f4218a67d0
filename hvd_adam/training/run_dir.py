"""The run folder: only one job writes to it at a time; it records which run it holds and where that resumes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from hvd_adam._version import __version__
from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.config import TrainConfig
from hvd_adam.data.sampling import number_of_updates, steps_per_epoch
from hvd_adam.errors import Preempted, UserError
from hvd_adam.log import logger
from hvd_adam.recovery.preemption import stop_requested
from hvd_adam.training.run_log import METRICS_FILE, read_events
from hvd_adam.versions import code_hash, installed_version

LOCK_FILE = ".lock"

# The ranks of a launcher that was killed end within 30 s.
WAIT_SECONDS = 60.0

# A POSIX lock ends when the process closes any descriptor of the file, so these files stay open.
_locked: dict[Path, IO[str]] = {}


def lock(folder: Path, *, wait: bool = True) -> None:
    """Locks a run folder against other jobs until this process ends, however it ends; rank 0 calls it.

    It is a POSIX lock on a file that is never removed: NFS supports it, and forked processes do not inherit it. A
    process may lock a folder more than once.

    Args:
        folder: the run folder; must exist.
        wait: wait up to `WAIT_SECONDS` for a job that holds the lock, and log which one it is. Otherwise return
            without the lock.

    Raises:
        UserError: another job holds the lock after `WAIT_SECONDS`.
        Preempted: this job was asked to stop while it waited.
        OSError: the folder cannot be written to.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _locked:
        return
    file = path.open("a+")
    deadline = None
    while not _try_lock(file, folder):
        if not wait:
            file.close()
            return
        file.seek(0)
        holder = file.read().strip() or "a job that is starting"
        if deadline is None:
            deadline = time.monotonic() + WAIT_SECONDS
            logger.info(f"waiting up to {WAIT_SECONDS:g} s for the job that holds the lock of {folder}: {holder}")
        if stop_requested():
            raise Preempted
        if time.monotonic() > deadline:
            raise UserError(f"another job writes to {folder}: {holder}; end it, or choose another --output-dir")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _locked[path] = file


def _try_lock(file: IO[str], folder: Path) -> bool:
    """Returns whether this process may write: it has the lock, or the file system does not support locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.warning(f"the file system of {folder} does not support locks: let no other job write to the folder")
    return True


def holds_run(folder: Path) -> bool:
    """Returns whether a run has started in the folder: metrics, or checkpoints that a new run would replace.

    Raises:
        UserError: the folder exists, but cannot be read.
    """
    metrics = folder / METRICS_FILE
    try:
        has_metrics = metrics.exists() and metrics.stat().st_size > 0
        return has_metrics or bool(storage.newest_first(folder / "checkpoints"))
    except OSError as error:
        raise UserError(
            f"cannot read the run folder {folder} ({error.strerror}): choose another --output-dir"
        ) from None


def resumes(config: TrainConfig) -> bool:
    """Returns whether `--output-dir` holds a run already."""
    return config.output_dir is not None and holds_run(Path(config.output_dir))


def has_ended(folder: Path) -> bool:
    """Returns whether the folder's run has recorded its end."""
    metrics = folder / METRICS_FILE
    return metrics.exists() and any(event.get("event") == "end" for event in read_events(metrics))


def starting_checkpoint(folder: Path, key: str = "path") -> Path | None:
    """Returns the PATH of `--resume` that the folder's run started from, or with "checkpoint" what that was."""
    try:
        with (folder / METRICS_FILE).open() as lines:
            first = json.loads(lines.readline())
    except (ValueError, FileNotFoundError):
        return None  # a killed process left an incomplete line, or the user has removed the file
    resumed = isinstance(first, dict) and first.get("event") == "resume" and key in first
    return Path(first[key]) if resumed else None


@dataclass(frozen=True)
class ResumePoint:
    """The state from which a run resumes.

    Attributes:
        path: the checkpoint's folder, the PATH of `--resume`, or "memory".
        state: the saved state.
        damaged: one message for each newer checkpoint that is damaged.
        checkpoint: the checkpoint's folder also where `path` is a run folder or a pointer.
    """

    path: str
    state: TrainingState
    damaged: list[str]
    checkpoint: str

    def without_tensors(self) -> ResumePoint:
        """Returns it without model, optimizer, loss scaler, averages and residuals: each is sent by itself."""
        state = replace(
            self.state, model={}, optimizer={}, loss_scaler=None, ema=None, residuals=None, islands=None
        )
        return replace(self, state=state)


def run_folder(config: TrainConfig) -> Path:
    """Returns the folder of a run that starts now."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.dataset}-{config.model}".replace(":", ".")
    return Path(config.output_dir or Path("runs") / name)


def open_run(
    config: TrainConfig, size: int, in_memory: TrainingState | None, data: Mapping[str, Any]
) -> tuple[Path, ResumePoint | None]:
    """Locks a run's folder and writes `config.yaml` into it.

    Args:
        config: the run's configuration.
        size: number of ranks.
        in_memory: a state in memory to resume from instead of a checkpoint, or None.
        data: `DeviceLoader.description()`.

    Returns:
        The folder, and the point from which the run resumes: None for a new run.

    Raises:
        UserError: the folder cannot be written to, or holds another run, or another job writes to it; or the
            checkpoint cannot be read, or belongs to another run or to other data.
    """
    folder = run_folder(config)
    try:
        batch = None if config.elastic else config.global_batch(size)
        resume = None if in_memory is None else ResumePoint("memory", in_memory, [], "memory")
        if resume is None and not folder.exists():
            # Before mkdir: an error leaves no folder behind.
            resume = find_resume_point(config, folder, batch, data)
        folder = _made(folder, is_new=config.output_dir is None)
        # After a change of ranks, the rank that holds the lock may be cut off from this one and still running.
        lock(folder, wait=in_memory is None)
        if resume is None or (in_memory is None and holds_run(folder)):
            resume = find_resume_point(config, folder, batch, data)
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()}
        text = _config_head(size) + yaml.safe_dump(values, sort_keys=False)
        write_atomically(folder / "config.yaml", text)
        _require_writable(folder / "checkpoints")
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder} ({error.strerror}): choose another --output-dir"
        ) from None
    if resume is not None:
        _note_length(config, resume.state, data)
    return folder, resume


def _note_length(config: TrainConfig, state: TrainingState, data: Mapping[str, Any]) -> None:
    """Logs that a run which resumes has another length, where its learning rates depend on that."""
    batch = state.progress["global_batch_size"]
    now, before = (
        number_of_updates(length["epochs"], steps_per_epoch(images, batch), length["max_steps"])
        for length, images in (
            (asdict(config), data["train_images"]),
            (state.config, state.data.get("train_images", data["train_images"])),
        )
    )
    if config.lr_decay in ("cosine", "linear") and now != before and state.progress["step"] < now:
        logger.info(
            f"the run has {now} updates, and had {before}: --lr-decay {config.lr_decay} now ends after {now}, so "
            f"the result is not that of a run of {now} updates from the start"
        )


def _made(folder: Path, *, is_new: bool) -> Path:
    """Makes the run folder; a new one gets a number if another run has made it in the same second."""
    if not is_new:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    made, numbers = folder, count(2)
    while True:
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            made = folder.with_name(f"{folder.name}-{next(numbers)}")
        else:
            return made


def _require_writable(checkpoints: Path) -> None:
    """Writes to the folder of the checkpoints if there is one: the first checkpoint may be hours away.

    Raises:
        UserError: it cannot be written to.
    """
    if not os.path.lexists(checkpoints):
        return  # the run folder was written to
    try:
        with tempfile.TemporaryFile(dir=checkpoints) as file:
            file.write(b"checkpoint")
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {checkpoints} ({error.strerror}): choose another --output-dir"
        ) from None


def _config_head(ranks: int) -> str:
    """Returns YAML comments with the command line, the number of ranks, the versions and the hash of the code."""
    packages = ("torch", "horovod", "numpy")
    versions = [f"hvd_adam {__version__} (code hash {code_hash()})", f"Python {platform.python_version()}"]
    versions += [f"{name} {installed_version(name)}" for name in packages]
    lines = [
        f"Written by hvd_adam.train at {time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}.",
        f"Command line: {shlex.join(sys.orig_argv)}",
        f"World size: {ranks}",
        f"Versions: {', '.join(versions)}",
    ]
    return "".join(f"# {_printable(line)}\n" for line in lines)


def _printable(text: str) -> str:
    """Replaces characters that would end a comment, that YAML refuses or that some locale cannot encode."""
    return text.encode("unicode_escape").decode().replace("\\\\", "\\")


def find_resume_point(
    config: TrainConfig, folder: Path, global_batch_size: int | None, data: Mapping[str, Any]
) -> ResumePoint | None:
    """Returns what `--resume` refers to; None for a new run.

    The folder must be locked if it holds a run: checkpoints that a killed process was replacing get their names
    back.

    Args:
        config: the run's configuration.
        folder: of the run.
        global_batch_size: samples per update; None: any.
        data: `DeviceLoader.description()`.

    Raises:
        UserError: the checkpoint cannot be read, or belongs to another run or to other data.
    """
    given = None if config.resume in ("auto", "never") else Path(os.path.abspath(config.resume))
    path: Path | None = None
    saved: dict[str, Any] = {}
    damaged: list[str] = []
    if holds_run(folder):
        started_from = starting_checkpoint(folder)
        if config.resume == "never":
            raise UserError(f"{folder} holds a run already: choose another --output-dir, or remove it")
        if given not in (None, started_from):
            raise UserError(
                f"{folder} holds a run that did not start from {config.resume}: choose another --output-dir, or "
                "resume that run with --resume auto"
            )
        path, saved, damaged = storage.load_newest(folder / "checkpoints")
        if damaged and path is None:
            raise UserError(f"{folder} has no intact checkpoint: {damaged[0]}")
        given = started_from
    checkpoint = path
    if path is None and given is not None:  # the same as at the first start, whatever that run has written since
        checkpoint = starting_checkpoint(folder, "checkpoint") or storage.resolve(given)
        path, saved = given, storage.load(checkpoint)
    if path is None:
        return None  # a new run, or one that was killed before its first checkpoint
    state = TrainingState.from_dict(saved, str(path))
    state.require_same_run(asdict(config), global_batch_size, str(path))
    state.require_same_data(data, str(path), allow_change=config.allow_data_change)
    return ResumePoint(str(path), state, damaged, str(checkpoint))
