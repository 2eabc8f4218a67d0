"""`BestCheckpoint`: `checkpoints/best` and the best scores in `Progress` name the same evaluation."""

from __future__ import annotations

from pathlib import Path

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import Progress
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import UserError
from hvd_adam.log import logger


class BestCheckpoint:
    """Decides which evaluations are the best; those whose checkpoint could not be written do not count.

    A process that was killed after it had written a checkpoint may not have marked it as the best one; that is
    done when this is created.

    Args:
        cluster: this process.
        checkpoints: the folder of all checkpoints of the run; None on the ranks that do not write.
        progress: the run's; its best scores are updated.
    """

    def __init__(self, cluster: Cluster, checkpoints: Path | None, progress: Progress) -> None:
        self._cluster, self._checkpoints, self._progress = cluster, checkpoints, progress
        self._before = self._best()
        self._pending = self._failed = False
        step = progress.best_step
        if checkpoints is None or step is None:
            return
        marked, best = storage.marked_best(checkpoints), storage.checkpoint_path(checkpoints, step)
        if best.is_dir() and (marked is None or storage.step_of(marked) < step):
            try:
                storage.mark_best(best)
            except UserError as error:
                logger.warning(str(error))

    def is_best(self, accuracy: float | None, loss: float) -> bool:
        """Returns whether an evaluation is the best so far; if so, the next checkpoint must be its own.

        Every rank must call it, after the result of the previous checkpoint is known: the ranks must agree, and
        only rank 0 writes.
        """
        if any(self._cluster.gather(int(self._failed))):
            self._take_back()
        self._failed, self._before = False, self._best()
        self._pending = self._progress.is_best(accuracy, loss)
        return self._pending

    def written(self) -> None:
        """Notes that a checkpoint was written."""
        self._pending = False

    def failed(self) -> None:
        """Takes the last evaluation back if the checkpoint that could not be written was to be the best one."""
        if not self._pending or self._checkpoints is None:
            return
        self._pending = False
        marked = storage.marked_best(self._checkpoints)  # only the removal of older ones may have failed
        if marked is None or storage.step_of(marked) != self._progress.best_step:
            self._failed = True
            self._take_back()

    def _best(self) -> tuple[float | None, float | None, int | None]:
        progress = self._progress
        return progress.best_accuracy, progress.best_loss, progress.best_step

    def _take_back(self) -> None:
        progress = self._progress
        progress.best_accuracy, progress.best_loss, progress.best_step = self._before
