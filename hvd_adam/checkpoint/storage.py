"""Checkpoints on disk. A checkpoint is either complete or absent, whenever the process is killed.

A checkpoint is a folder `checkpoints/step-00000123/` with two files: `state.pt`, a dictionary that
`torch.load(..., weights_only=True)` reads, and `manifest.json` with its size and checksum. The folder is written
under a temporary name, flushed to disk and renamed. `checkpoints/latest` contains the name of the newest
checkpoint, `checkpoints/best` the name of the one with the highest test accuracy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from hvd_adam._version import __version__
from hvd_adam.checkpoint.files import (
    HashingFile,
    errors_of_writes,
    fsync,
    publish,
    sha256,
    write_atomically,
    write_draft,
)
from hvd_adam.checkpoint.loadable import loadable
from hvd_adam.errors import UserError
from hvd_adam.log import logger

STATE = "state.pt"
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
NAME = re.compile(r"step-[0-9]{8,}")
BACKUP = re.compile(r"\.step-[0-9]{8,}\.old")
DRAFT = re.compile(r"\.step-[0-9]{8,}\.(old|[0-9]+)|\.(latest|best)\.new")


class OneCheckpoint(UserError):
    """`which` is "best", but the path is of one checkpoint, of which there is no choice."""


def checkpoint_path(checkpoints: Path, step: int) -> Path:
    """Returns the folder of the checkpoint after `step` updates, whether it exists or not."""
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Returns the number of updates of the checkpoint in a folder that `checkpoint_path` returned."""
    return int(folder.name.rpartition("-")[2])


def newest_first(checkpoints: Path) -> list[Path]:
    """Returns the folders of all checkpoints, the newest first; `latest` may name an older one.

    What has another name, such as a user's copy `step-00000123-good`, is not one of them, nor is a file.

    Raises:
        OSError: the folder exists, but cannot be read.
    """
    return sorted((path for path in _named(checkpoints, NAME) if path.is_dir()), key=step_of, reverse=True)


def _named(checkpoints: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Returns what has a name of ours. `Path.glob` would return nothing for a folder that cannot be read."""
    try:
        return [path for path in checkpoints.iterdir() if pattern.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def load_newest(checkpoints: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Loads the newest intact checkpoint of a run. No process may write to the folder meanwhile.

    Returns:
        The checkpoint's folder (None if there is none), its state (empty if there is none), and for each newer
        checkpoint a message that says how it is damaged.

    Raises:
        OSError: the folder exists, but cannot be read, or a checkpoint cannot be given its name back.
    """
    _put_back(checkpoints)
    damaged: list[str] = []
    for folder in newest_first(checkpoints):
        try:
            return folder, load(folder), damaged
        except UserError as error:
            damaged.append(str(error))
    return None, {}, damaged


def _put_back(checkpoints: Path) -> None:
    """Gives checkpoints their names back that a process had when it was killed inside `_replace`."""
    for backup in _named(checkpoints, BACKUP):
        final = checkpoints / backup.stem[1:]
        if not final.exists():
            backup.rename(final)


def remove_drafts(checkpoints: Path) -> None:
    """Removes the temporary files that a killed process has left. No process may write to the folder meanwhile.

    Other hidden files stay: the folder may be a project's, with its `.git`. What cannot be removed, on NFS a file
    that a reader has open, is reported: no checkpoint needs its place.

    Raises:
        OSError: as for `load_newest`.
    """
    _put_back(checkpoints)
    for draft in _named(checkpoints, DRAFT):
        try:
            if draft.is_dir() and not draft.is_symlink():
                shutil.rmtree(draft)
            else:
                draft.unlink()
        except OSError as error:
            logger.warning(f"cannot remove {draft}, left by a killed job: {_reason(error)}")


def _reason(error: Exception) -> str:
    """Returns the first line of an error's message; its type if it has no message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def save(checkpoints: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes a checkpoint and returns its folder.

    Args:
        checkpoints: the folder of all checkpoints of a run; created if it does not exist.
        step: number of updates made so far, ≥ 0. An existing checkpoint of the same step is replaced.
        state: plain containers, numbers, strings and tensors; see `loadable`.

    Raises:
        UserError: the checkpoint cannot be written, for example because the disk is full, or holds a value that
            could not be loaded again. Earlier checkpoints are unchanged.
    """
    state = loadable(state)
    final = checkpoint_path(checkpoints, step)
    draft = checkpoints / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, step, state)
        # Written before the checkpoint appears: a disk that fills up here must not leave `latest` behind it.
        latest = write_draft(checkpoints / LATEST, final.name + "\n")
        _replace(draft, final)
        publish(latest, checkpoints / LATEST)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write the checkpoint {final}: {_reason(error)}; check the disk") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    with (folder / STATE).open("wb") as file:
        hashed = HashingFile(file)
        with errors_of_writes():
            torch.save(state, cast("IO[bytes]", hashed))  # torch.save calls only write and flush
    manifest = {
        "files": {STATE: {"bytes": (folder / STATE).stat().st_size, "sha256": hashed.digest.hexdigest()}},
        "step": step,
        "versions": {"hvd_adam": __version__, "torch": torch.__version__},
    }
    (folder / MANIFEST).write_text(_sealed(manifest))
    for path in (folder / STATE, folder / MANIFEST, folder):
        fsync(path)


def _replace(draft: Path, final: Path) -> None:
    """Renames the draft to its final name; an older checkpoint of that name is renamed first, removed last.

    Raises:
        OSError: the draft cannot be renamed. The older checkpoint has its name back.
    """
    if not final.is_dir():
        draft.rename(final)
        return
    backup = draft.with_suffix(".old")
    _discard(backup)  # of an earlier replacement
    final.rename(backup)
    try:
        draft.rename(final)
    except OSError:
        with suppress(OSError):  # the first error says what is wrong; `_put_back` tries again
            backup.rename(final)
        raise
    _discard(backup)


def _discard(backup: Path) -> None:
    """Removes a backup. What cannot be removed gets the name of a draft, so that the next backup has its name.

    On NFS, a file that a reader has open keeps its folder from being removed.
    """
    shutil.rmtree(backup, ignore_errors=True)
    with suppress(OSError):  # raised whenever it has been removed
        backup.rename(backup.with_suffix(f".{time.time_ns()}"))


def load(path: str | Path) -> dict[str, Any]:
    """Verifies a checkpoint and returns its state, with all tensors on the CPU.

    Args:
        path: a checkpoint's folder or its `state.pt`; the file `latest` or `best`; a `checkpoints` folder or a
            run folder (of which the latest checkpoint is loaded).

    Raises:
        UserError: there is no checkpoint, or a file is missing, unreadable, truncated or altered; the message
            names the file.
    """
    folder = resolve(path)
    try:
        _verify(folder)
        with warnings.catch_warnings():  # PyTorch 2.1 warns of a class of its own
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # of a file that is not PyTorch's, torch.load raises whatever its bytes lead to
        raise UserError(f"checkpoint {path} cannot be read: {_reason(error)}; use another checkpoint") from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} cannot be read: {STATE} holds a {type(state).__name__}, not a dict")
    return state


def resolve(path: str | Path, which: str = "newest") -> Path:
    """Returns the folder of the checkpoint that a path refers to.

    Args:
        path: as for `load`.
        which: "newest" or "best": of a run folder or a `checkpoints` folder, the checkpoint to take.

    Raises:
        OneCheckpoint: `which` is "best" and the path is of one checkpoint.
        UserError: there is no such checkpoint, or the path cannot be read.
    """
    try:
        return _find(Path(path), which)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}; use another checkpoint") from None


def _find(path: Path, which: str) -> Path:
    name = BEST if which == "best" else LATEST
    for pointer in (path / name, path / "checkpoints" / name):
        if pointer.is_file():
            return _read_pointer(pointer)
    folder = path.parent if path.name == STATE else path
    is_pointer = path.name in (LATEST, BEST) and path.is_file()
    if is_pointer or (folder / MANIFEST).exists() or (folder / STATE).exists():
        if which == "best":
            raise OneCheckpoint(f"best has no effect on {path}, which is one checkpoint: give its run folder")
        return _read_pointer(path) if is_pointer else folder
    if which == "best" and any((each / LATEST).is_file() for each in (path, path / "checkpoints")):
        raise UserError(f"{path} has no best checkpoint: the run has not been evaluated yet")
    raise UserError(f"no checkpoint in {path}: give a run folder, its checkpoints folder or one checkpoint")


def _read_pointer(pointer: Path) -> Path:
    """Returns the checkpoint that `latest` or `best` names; it is in the same folder."""
    name = pointer.read_text(errors="replace").strip()
    if not NAME.fullmatch(name):
        raise UserError(f"{pointer} is damaged: it names no checkpoint; give a path in {pointer.parent} itself")
    return pointer.with_name(name)


def marked_best(checkpoints: Path) -> Path | None:
    """Returns the checkpoint that `best` names; None if there is no such file, or it cannot be read."""
    try:
        return _read_pointer(checkpoints / BEST)
    except (OSError, UserError):
        return None


def mark_best(folder: Path) -> None:
    """Makes `best` name a checkpoint; raises UserError if it cannot be written."""
    try:
        write_atomically(folder.with_name(BEST), folder.name + "\n")
    except OSError as error:
        raise UserError(f"checkpoint {folder} is written, but cannot be marked as the best: {error}") from None


def _sealed(manifest: dict[str, Any], seal: str = "") -> str:
    """Returns the manifest as JSON with "seal", the checksum of the same text with an empty seal."""
    text = json.dumps({**manifest, "seal": seal}, indent=1) + "\n"
    return text if seal else _sealed(manifest, hashlib.sha256(text.encode()).hexdigest())


def _verify(folder: Path) -> None:
    try:
        text = (folder / MANIFEST).read_text()
        manifest = json.loads(text)
        entry = manifest["files"][STATE]
        expected = entry["bytes"], entry["sha256"]
        manifest.pop("seal")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} is unreadable ({error!r})") from None
    if text != _sealed(manifest):
        raise UserError(f"checkpoint {folder} is damaged: {MANIFEST} does not match its checksum; use another one")
    state = folder / STATE
    if not state.is_file():
        raise UserError(f"checkpoint {folder} is damaged: {STATE} is missing; use another checkpoint")
    if (state.stat().st_size, sha256(state)) != expected:
        raise UserError(f"checkpoint {folder} is damaged: {STATE} does not match its checksum; use another one")
