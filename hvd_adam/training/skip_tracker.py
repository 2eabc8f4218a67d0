"""Counts and logs updates that were skipped because a gradient was not finite."""

from __future__ import annotations

import torch

from hvd_adam.checkpoint.state import Progress
from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.errors import JobError
from hvd_adam.training.run_log import RunLog


class SkipTracker:
    """Reads whether an update was skipped only after the next one is queued, so that a GPU does not run idle.

    Args:
        cluster: this process.
        optimizer: counts the skipped updates.
        progress: the run's; its `skipped` and `skipped_in_a_row` are updated.
        log: the run's record.
        max_skipped: the number of skipped updates in a row that is allowed.
    """

    def __init__(
        self,
        cluster: Cluster,
        optimizer: DistributedAdam | LocalAdam,
        progress: Progress,
        log: RunLog,
        max_skipped: int,
    ) -> None:
        self._cluster, self._optimizer = cluster, optimizer
        self._progress, self._log, self._max_skipped = progress, log, max_skipped
        self._pending: tuple[int, int, torch.Tensor] | None = None

    def add(self, nonfinite_loss: torch.Tensor) -> None:
        """Adds the update that was just made.

        Args:
            nonfinite_loss: int32, shape (1,): 1 if a loss of this rank was not finite, else 0.
        """
        self._pending = self._progress.step, self._progress.epoch, nonfinite_loss

    def record(self) -> JobError | None:
        """Records whether the last update was skipped; every rank must call it.

        Returns:
            The error that ends the job if more than `max_skipped` updates in a row were skipped, else None.
        """
        if self._pending is None:
            return None
        (step, epoch, nonfinite), self._pending = self._pending, None
        progress = self._progress
        before, progress.skipped = progress.skipped, self._optimizer.skipped_updates
        if progress.skipped == before:
            progress.skipped_in_a_row = 0
            return None
        if isinstance(self._optimizer, LocalAdam):  # known since the last meeting
            return self._record_islands(self._optimizer, step, epoch)
        progress.skipped_in_a_row += 1
        if self._cluster.size > 1:
            nonfinite = horovod().allgather(nonfinite, name="hvd_adam.bad")
        ranks = nonfinite.nonzero().flatten().tolist()
        reason = f"loss of rank {', '.join(map(str, ranks))} not finite" if ranks else "gradient not finite"
        self._log.event("skip", step, epoch, reason=reason, skipped=progress.skipped)
        return self._too_many(step, reason)

    def _record_islands(self, optimizer: LocalAdam, step: int, epoch: int) -> JobError | None:
        progress, reason = self._progress, "gradient of an island not finite"
        progress.skipped_in_a_row = optimizer.skipped_in_a_row
        self._log.event("skip", step, epoch, reason=reason, skipped=progress.skipped)
        return self._too_many(step, reason)

    def _too_many(self, step: int, reason: str) -> JobError | None:
        progress = self._progress
        if progress.skipped_in_a_row <= self._max_skipped:
            return None
        return JobError(
            f"{progress.skipped_in_a_row} updates in a row were skipped, the last one, update {step}, with the "
            f"{reason}; weights and checkpoints are good: look at the data, lower --lr, or raise --max-skipped"
        )
