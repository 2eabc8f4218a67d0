"""`Run`: the parts of a training run on one rank, and `BatchSizes`: how it is divided into updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvd_adam.checkpoint.state import Progress
from hvd_adam.config import TrainConfig
from hvd_adam.data.protocols import Loader
from hvd_adam.data.sampling import number_of_updates
from hvd_adam.distributed.context import Cluster
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.recovery.preemption import Preemption
from hvd_adam.recovery.watchdog import Watchdog
from hvd_adam.schedule import LearningRateSchedule
from hvd_adam.training.objective import Objective
from hvd_adam.training.run_dir import ResumePoint
from hvd_adam.training.tuning.options import Choice
from hvd_adam.training.weights.ema import ModelAverage


@dataclass(frozen=True)
class BatchSizes:
    """How a run is divided into updates, and each update's global batch into micro-batches.

    Attributes:
        global_batch: images per update, over all ranks.
        micro_batch: the largest number of images in a micro-batch of one rank.
        accumulate: micro-batches per rank and update.
        steps_per_epoch: updates per epoch.
        total_steps: updates in the whole run.
    """

    global_batch: int
    micro_batch: int
    accumulate: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of_run(cls, config: TrainConfig, loader: Loader, ranks: int, resume: ResumePoint | None) -> BatchSizes:
        """Computes the sizes for this number of ranks.

        In an elastic run, an update keeps the images that it had at the start of the run. If ranks are missing,
        the remaining ranks run more micro-batches, none of them larger than before.
        """
        if resume is None or not config.elastic:
            global_batch, accumulate = config.global_batch(ranks), config.accumulate
            micro_batch = -(-global_batch // (ranks * accumulate))
        else:
            global_batch = resume.state.progress["global_batch_size"]
            micro_batch = resume.state.progress["micro_batch_size"]
            accumulate = -(-global_batch // (ranks * micro_batch))
        steps_per_epoch = loader.steps_per_epoch(global_batch)
        total_steps = number_of_updates(config.epochs, steps_per_epoch, config.max_steps)
        return cls(global_batch, micro_batch, accumulate, steps_per_epoch, total_steps)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 1, that update `step` belongs to."""
        return max(1, -(-step // self.steps_per_epoch))

    def is_logged(self, step: int, every: int) -> bool:
        """Returns whether metrics are logged after update `step`: every `every` updates, and once an epoch."""
        if step % every == 0 or step == self.total_steps:
            return True
        start = step - self.steps_per_epoch
        return step % self.steps_per_epoch == 0 and start // every == step // every

    def resumed(self, saved: Progress) -> Progress:
        """Returns the progress of a checkpoint in epochs of this run, which may differ from those of that one."""
        end = saved.epoch * self.steps_per_epoch
        if not end - self.steps_per_epoch <= saved.step <= end:  # the size of the data set has changed
            return replace(saved, epoch=self.epoch_of(saved.step), epoch_done=False)
        # --max-steps may have ended that run within an epoch, and may now allow more updates.
        done = saved.epoch_done and (saved.step == end or saved.step >= self.total_steps)
        is_scored = saved.step < self.total_steps or saved.scores is not None
        return replace(saved, epoch_done=done and is_scored)


@dataclass(frozen=True)
class Parts:
    """The parts of a run that `--tune` does not change.

    Attributes:
        cluster: this process.
        watchdog: ends the job if it makes no progress.
        preemption: whether to stop, the same on every rank.
        loader: batches on this rank's device.
        model: the model; identical on all ranks.
        objective: loss and metrics.
        ema: the moving average of the model's weights, if the run has one.
        scaler: the loss scaler of "fp16", else None.
    """

    cluster: Cluster
    watchdog: Watchdog
    preemption: Preemption
    loader: Loader
    model: torch.nn.Module
    objective: Objective
    ema: ModelAverage | None
    scaler: Any | None


@dataclass(frozen=True)
class Run(Parts):
    """The parts of a run on this rank.

    Attributes:
        config: the configuration, with what `--tune` has chosen.
        choice: that choice, and why; None without `--tune`.
        sizes: sizes of batches, epochs and the run.
        optimizer: the distributed optimizer; its state is identical on all ranks, or sharded, or of an island.
        schedule: the learning-rate schedule.
        folder: the run folder; None on ranks other than 0.
        resume: the point from which the run resumes, without tensors that are loaded already; None for a new run.
    """

    config: TrainConfig
    sizes: BatchSizes
    optimizer: DistributedAdam | LocalAdam
    schedule: LearningRateSchedule
    choice: Choice | None = None
    folder: Path | None = None
    resume: ResumePoint | None = None
