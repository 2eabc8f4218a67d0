"""Training state on disk: a checkpoint is there whole or not at all.

A checkpoint is a folder `checkpoints/step-00000123/` with `state.pt`, a dictionary that
`torch.load(..., weights_only=True)` reads, and `manifest.json` with its size and checksum. It is written
under another name, flushed to disk and renamed; `checkpoints/latest` holds the name of the newest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import hvd_adam
from hvd_adam.errors import UserError

STATE = "state.pt"
MANIFEST = "manifest.json"
LATEST = "latest"


def save(checkpoints: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `state` (plain containers, numbers, strings and tensors) and returns the checkpoint's folder.

    Args:
        checkpoints: the folder of all checkpoints of a run; made if it is not there.
        step: number of updates made so far, ≥ 0.
    """
    final = checkpoints / f"step-{step:08d}"
    draft = checkpoints / f".{final.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    torch.save(state, draft / STATE)
    manifest = {
        "files": {STATE: {"bytes": (draft / STATE).stat().st_size, "sha256": _sha256(draft / STATE)}},
        "step": step,
        "versions": {"hvd_adam": hvd_adam.__version__, "torch": torch.__version__},
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in (draft / STATE, draft / MANIFEST, draft):
        _flush(path)
    if final.exists():  # the same step again: the same run made it
        shutil.rmtree(final)
    draft.rename(final)
    _write_whole(checkpoints / LATEST, final.name + "\n")
    return final


def load(path: str | Path) -> dict[str, Any]:
    """Reads and verifies a checkpoint; tensors come to the CPU.

    Args:
        path: a checkpoint's folder, a run's `checkpoints` folder or a run folder (their latest checkpoint).

    Raises:
        UserError: nothing there, or a file is missing, truncated or altered; names the file.
    """
    folder = _find(Path(path))
    manifest_path = folder / MANIFEST
    try:
        files = json.loads(manifest_path.read_text())["files"]
        expected = files[STATE]["bytes"], files[STATE]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"checkpoint {folder} is damaged: {manifest_path.name} is unreadable ({error!r})"
        ) from None
    state_path = folder / STATE
    if not state_path.is_file():
        raise UserError(f"checkpoint {folder} is damaged: {STATE} is missing; use another checkpoint")
    if (state_path.stat().st_size, _sha256(state_path)) != expected:
        raise UserError(f"checkpoint {folder} is damaged: {STATE} does not match its checksum; use another one")
    return torch.load(state_path, map_location="cpu", weights_only=True)


def _find(path: Path) -> Path:
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return folder / (folder / LATEST).read_text().strip()
    if (path / MANIFEST).exists() or (path / STATE).exists():
        return path
    raise UserError(f"no checkpoint in {path}: give a run folder, its checkpoints folder or one checkpoint")


def _write_whole(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    _flush(draft)
    draft.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
