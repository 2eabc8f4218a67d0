"""`Updater`: makes one update from a rank's micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from hvd_adam.data.protocols import Batch
from hvd_adam.models.precision import autocast
from hvd_adam.schedule import learning_rate
from hvd_adam.training.meters import RunningMean
from hvd_adam.training.run import Run
from hvd_adam.training.weights.batchnorm_guard import BatchNormSnapshot


class Updater:
    """Makes updates: the forward and backward passes of their micro-batches, and the step of the optimizer.

    Args:
        run: the parts of the run.
        precision: as `TrainConfig.precision`.
        compiled: compile the model with `torch.compile`.

    Attributes:
        mean_loss: the mean training loss since it was last read.
    """

    def __init__(self, run: Run, precision: str, *, compiled: bool) -> None:
        self._run, self._precision = run, precision
        self._forward = torch.compile(run.model) if compiled else run.model
        self._batchnorm = BatchNormSnapshot(run.model)
        self.mean_loss = RunningMean(run.cluster)

    def update(self, micro_batches: Sequence[Batch], number: int, record_last: Callable[[], None]) -> torch.Tensor:
        """Makes one update; every rank must call it.

        Args:
            micro_batches: of this rank.
            number: of updates made before, which decides the learning rate.
            record_last: called before the optimizer's step, while the device computes: records what became of the
                update before.

        Returns:
            Whether a loss of this rank was not finite: int32, shape (1,).
        """
        run = self._run
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(number, run.schedule)
        run.optimizer.zero_grad()
        self._batchnorm.save()
        nonfinite = torch.zeros(1, dtype=torch.int32, device=run.cluster.device)
        for left, (inputs, targets) in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            with autocast(self._precision, run.cluster.device):
                outputs = self._forward(inputs)
            loss = run.objective.loss(outputs, targets)
            finite = loss.detach().isfinite()
            # The weight is 1 unless micro-batches differ in size: every sample counts the same. With an infinite
            # loss gradients may be finite; a NaN weight makes all of them NaN, so the update is skipped. The
            # weight multiplies the loss: as an argument of backward() it would make that import sympy.
            weight = len(inputs) * run.cluster.size * run.sizes.accumulate / run.sizes.global_batch
            weighted = loss * torch.where(finite, loss.new_full((), weight), math.nan)
            (weighted if run.scaler is None else run.scaler.scale(weighted)).backward()
            if not left:
                record_last()  # by now a GPU has this update's passes in its queue
            run.optimizer.step()
            self.mean_loss.add(loss, len(inputs))
            nonfinite |= ~finite
        self._batchnorm.restore(run.optimizer.skipped)
        if run.ema is not None:
            run.ema.update(run.optimizer.skipped)
        return nonfinite
