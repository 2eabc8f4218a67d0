"""Training state on disk: a checkpoint is there whole or not at all.

A checkpoint is a folder `checkpoints/step-00000123/` with `state.pt`, a dictionary that
`torch.load(..., weights_only=True)` reads, and `manifest.json` with its size and checksum. It is written
under another name, flushed to disk and renamed; `checkpoints/latest` holds the name of the newest, and
`checkpoints/best` that of the one that scored best.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import hvd_adam
from hvd_adam.checkpoint.files import HashingFile, fsync, sha256, write_atomically
from hvd_adam.errors import UserError

STATE = "state.pt"
MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
NAME = re.compile(r"step-[0-9]{8,}")


class Writer:
    """Writes checkpoints beside the training, one at a time, and removes the oldest.

    Args:
        checkpoints: the folder of all checkpoints of a run. What a killed process left unfinished in it is
            removed.
        keep: how many of the newest stay, besides the best.
    """

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        for draft in checkpoints.glob(".*"):
            shutil.rmtree(draft, ignore_errors=True)
            draft.unlink(missing_ok=True)

    def close(self) -> None:
        """Waits for what is being written; what became of it nobody asks any more."""
        self._thread.shutdown()

    def write(self, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Begins to write; `take` what came of the one before first. `state` must not change meanwhile.

        Args:
            step: as of `save`.
            state: as of `save`.
            best: whether it is the best so far.
        """
        self._writing = self._thread.submit(self._save, step, state, best)

    def take(self, *, wait: bool) -> Path | None:
        """What has been written since this was last asked; None if nothing has, or is still being written.

        Args:
            wait: until it has been written.

        Raises:
            UserError: as `save`.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def _save(self, step: int, state: dict[str, Any], best: bool) -> Path:
        path = save(self._checkpoints, step, state)
        try:
            if best:
                write_atomically(self._checkpoints / BEST, path.name + "\n")
            self._remove_old()
        except OSError as error:
            raise UserError(f"cannot tidy up {self._checkpoints}: {error}") from None
        return path

    def _remove_old(self) -> None:
        best = self._checkpoints / BEST
        spared = best.read_text(errors="replace").strip() if best.exists() else None
        for old in _by_age(self._checkpoints)[self._keep :]:
            if old.name != spared:
                shutil.rmtree(old, ignore_errors=True)


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates is, or would be."""
    return checkpoints / f"step-{step:08d}"


def newest(checkpoints: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Reads the newest checkpoint of a run that is whole. Nobody may write meanwhile.

    Returns:
        Its folder (None if there is none), its state, and what is wrong with each newer one.
    """
    for aside in checkpoints.glob(".step-*.old"):  # of a process killed in the middle of `_replace`
        final = checkpoints / aside.stem[1:]
        if not final.exists():
            aside.rename(final)
    damaged = []
    for folder in _by_age(checkpoints):
        try:
            return folder, load(folder), damaged
        except UserError as error:
            damaged.append(str(error))
    return None, {}, damaged


def _by_age(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, the newest first. (A pointer may be older than the newest.)"""
    return sorted(checkpoints.glob("step-*"), key=lambda folder: (len(folder.name), folder.name), reverse=True)


def save(checkpoints: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (plain containers, numbers, strings and tensors) and returns the checkpoint's folder.

    Args:
        checkpoints: the folder of all checkpoints of a run; made if it is not there.
        step: number of updates made so far, ≥ 0. A checkpoint of the same step is replaced.

    Raises:
        UserError: it cannot be written (a full disk, say); earlier checkpoints are as they were.
    """
    final = folder_of(checkpoints, step)
    draft = checkpoints / f".{final.name}.{os.getpid()}"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, step, state)
        _replace(draft, final)
        write_atomically(checkpoints / LATEST, final.name + "\n")
    except (OSError, RuntimeError) as error:  # torch.save answers an OSError by a RuntimeError
        shutil.rmtree(draft, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = str(cause).splitlines()[0]
        raise UserError(f"cannot write the checkpoint {final}: {reason}; look after the disk") from None
    return final


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    with (folder / STATE).open("wb") as file:
        hashed = HashingFile(file)
        torch.save(state, hashed)
    manifest = {
        "files": {STATE: {"bytes": (folder / STATE).stat().st_size, "sha256": hashed.digest.hexdigest()}},
        "step": step,
        "versions": {"hvd_adam": hvd_adam.__version__, "torch": torch.__version__},
    }
    (folder / MANIFEST).write_text(_sealed(manifest))
    for path in (folder / STATE, folder / MANIFEST, folder):
        fsync(path)


def _replace(draft: Path, final: Path) -> None:
    """Puts the draft in the final one's place; an older one of that name is moved aside first, then removed."""
    aside = draft.with_suffix(".old")
    if final.exists():
        final.rename(aside)
    draft.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def load(path: str | Path) -> dict[str, Any]:
    """Reads and verifies a checkpoint; tensors come to the CPU.

    Args:
        path: a checkpoint's folder or its `state.pt`; a pointer, `latest` or `best`; a run's `checkpoints` folder
            or a run folder (their latest checkpoint).

    Raises:
        UserError: nothing there, or a file is unreadable, missing, truncated or altered; names the file.
    """
    try:
        folder = _find(Path(path))
        _verify(folder)
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (OSError, UnicodeDecodeError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}; use another checkpoint") from None


def _find(path: Path) -> Path:
    for pointer in (path, path / LATEST, path / "checkpoints" / LATEST):
        if pointer.name in (LATEST, BEST) and pointer.is_file():
            return _named_by(pointer)
    folder = path.parent if path.name == STATE else path
    if (folder / MANIFEST).exists() or (folder / STATE).exists():
        return folder
    raise UserError(f"no checkpoint in {path}: give a run folder, its checkpoints folder or one checkpoint")


def _named_by(pointer: Path) -> Path:
    """The checkpoint beside the pointer that it names."""
    name = pointer.read_text(errors="replace").strip()
    if not NAME.fullmatch(name):
        raise UserError(f"{pointer} is damaged: it names no checkpoint; give one of {pointer.parent} itself")
    return pointer.with_name(name)


def _sealed(manifest: dict[str, Any], seal: str = "") -> str:
    """The manifest's text with its own checksum in it: of the text without."""
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
