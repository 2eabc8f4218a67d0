"""`CheckpointWriter`: writes checkpoints in the background while training continues. Concerns one rank only."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.loadable import loadable
from hvd_adam.checkpoint.state import copy_to_cpu
from hvd_adam.errors import UserError


class CheckpointWriter:
    """Writes checkpoints one at a time in a background thread, and removes old ones.

    Each checkpoint is written atomically, with a checksum (see `checkpoint.storage`). Temporary files that a
    killed process left are removed when the writer is created.

    After each checkpoint, only those of its step and of earlier steps count for `keep`. Those of later steps, for
    example of an earlier run in the folder, or damaged ones that a resume has passed over, stay until a
    checkpoint of their step replaces them or training has passed their step. The checkpoint written last, which
    `latest` names, and the one that `best` names are never removed.

    Args:
        checkpoints: the folder of all checkpoints of a run; None on the ranks that do not write, where all
            methods do nothing.
        keep: how many of the newest checkpoints to keep, in addition to the best one; at least 1.

    Raises:
        UserError: the folder exists, but cannot be read.
    """

    def __init__(self, checkpoints: Path | None, keep: int) -> None:
        self._checkpoints, self._keep = checkpoints, keep
        self._copy: dict[str, Any] | None = None  # the state that is being written, or was written last
        self._pending: Future[Path] | None = None
        if checkpoints is not None:
            try:
                storage.remove_drafts(checkpoints)
            except OSError as error:
                raise UserError(f"cannot use the folder {checkpoints}: {error}") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> None:
        """Copies the state to the CPU and starts to write it; first waits for the previous checkpoint.

        Args:
            step: number of updates made so far, ≥ 0.
            state: plain containers, numbers, strings and tensors, for example `TrainingState.as_dict()`.
            best: whether `checkpoints/best` shall name this checkpoint.

        Raises:
            UserError: the previous checkpoint could not be written, and `result` has not reported it; or the state
                holds a value that could not be loaded again (see `loadable`).
        """
        if self._checkpoints is None:
            return
        self.result(wait=True)
        self._copy = copy_to_cpu(loadable(state), over=self._copy)
        self._pending = self._thread.submit(self._write, self._checkpoints, step, self._copy, best)

    def result(self, *, wait: bool) -> Path | None:
        """Returns the folder of the checkpoint that was completed since the last call, or None.

        Args:
            wait: whether to wait for a checkpoint that is being written.

        Raises:
            UserError: the checkpoint could not be written.
        """
        if self._pending is None or not (wait or self._pending.done()):
            return None
        pending, self._pending = self._pending, None
        return pending.result()

    def close(self) -> None:
        """Waits for the checkpoint that is being written; does not report its result."""
        self._thread.shutdown()

    def _write(self, checkpoints: Path, step: int, state: dict[str, Any], best: bool) -> Path:
        path = storage.save(checkpoints, step, state)
        if best:
            storage.mark_best(path)
        try:
            self._remove_old(checkpoints, path)
        except OSError as error:
            raise UserError(f"cannot remove old checkpoints in {checkpoints}: {error}") from None
        return path

    def _remove_old(self, checkpoints: Path, written: Path) -> None:
        best = checkpoints / storage.BEST
        kept = {written.name, best.read_text(errors="replace").strip() if best.exists() else ""}
        last = storage.step_of(written)
        counted = [folder for folder in storage.newest_first(checkpoints) if storage.step_of(folder) <= last]
        for old in counted[self._keep :]:
            if old.name not in kept:
                shutil.rmtree(old, ignore_errors=True)
