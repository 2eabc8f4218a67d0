"""A run's checkpoints as it goes: written beside the training, and recorded when they are there."""

from __future__ import annotations

from pathlib import Path

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import TrainingState
from hvd_adam.errors import UserError
from hvd_adam.training.run_log import RunLog


class Saver:
    """Rank 0's; on the other ranks (`folder` None) it does nothing.

    Args:
        folder: the run's.
        keep: as in `storage.Writer`.
        log: takes the events.
    """

    def __init__(self, folder: Path | None, keep: int, log: RunLog) -> None:
        self._folder, self._log = folder, log
        self._saved: TrainingState | None = None  # what is being, or was last, written
        self._writer = None if folder is None else storage.Writer(folder / "checkpoints", keep)

    def close(self) -> None:
        """Waits for what is being written."""
        if self._writer is not None:
            self._writer.close()

    def write(self, state: TrainingState, *, best: bool) -> None:
        """Begins to write a copy of `state`, once the one before has been written, or has failed."""
        if self._writer is None:
            return
        step = state.progress["step"]
        self.report(step, state.progress["epoch"], wait=True)
        self._saved = state.copy(over=self._saved)
        self._writer.write(step, self._saved.as_dict(), best=best)

    def report(self, step: int, epoch: int, *, wait: bool = False) -> None:
        """Records what has been written. Without a disk training goes on: a failure is said, no more."""
        try:
            self.record(step, epoch, wait=wait)
        except UserError as error:
            self._log.event("checkpoint_failed", step, epoch, reason=str(error))
            self._log.say(f"warning: {error}; training goes on")

    def record(self, step: int, epoch: int, *, wait: bool) -> Path | None:
        """Records what has been written since it was last asked; its folder, None if there is nothing.

        Args:
            step: updates made by now.
            epoch: of now.
            wait: until it has been written.

        Raises:
            UserError: it could not be written.
        """
        path = None if self._writer is None else self._writer.take(wait=wait)
        if path is not None:
            self._log.event("checkpoint", step, epoch, path=str(path.relative_to(self._folder)))
        return path
