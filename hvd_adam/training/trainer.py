"""One training run, top to bottom: set up on every rank, the loop over epochs and steps, and what it leaves."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hvd_adam
from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import (
    TrainingState,
    gather_rank_states,
    rank_state,
    require_same_tensors,
    restore_rng_state,
)
from hvd_adam.config import TrainConfig
from hvd_adam.data.loader import Batch
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.broadcast import ROOT, broadcast_buffers
from hvd_adam.distributed.consistency import require_consistent
from hvd_adam.distributed.context import Cluster, horovod, init
from hvd_adam.errors import JobError, MembershipChanged, Preempted
from hvd_adam.optim.adam import Adam
from hvd_adam.recovery.elastic import InMemoryCheckpoint
from hvd_adam.recovery.preemption import Preemption
from hvd_adam.recovery.watchdog import Watchdog, defer_horovod_stall_shutdown
from hvd_adam.schedule import learning_rate
from hvd_adam.training import run_dir
from hvd_adam.training.batchnorm_guard import BatchNormSnapshot
from hvd_adam.training.builders import build_model, make_adam, make_loader, make_schedule, scale_for_ranks
from hvd_adam.training.checkpoint_manager import Saver
from hvd_adam.training.evaluation import Scores, score
from hvd_adam.training.meters import RunningMean, ThroughputMeter
from hvd_adam.training.plots import plot
from hvd_adam.training.precision import autocast, loss_scaler, make_deterministic
from hvd_adam.training.run_dir import Start
from hvd_adam.training.run_log import RunLog


class Trainer:
    """A run from its configuration; every rank makes one and calls `run`.

    Args:
        config: of the run; the same on all ranks.
        memory: what the ranks keep where they may come and go (`recovery.elastic`); None where they do not.

    Raises:
        UserError: the configuration does not fit the data, the machine or the ranks; the same on every rank.
    """

    def __init__(self, config: TrainConfig, memory: InMemoryCheckpoint | None = None) -> None:
        self.config, self.memory = config, memory
        with ExitStack() as opened:  # a start that fails, where ranks come and go, leaves nothing behind
            self._set_up(opened)
            self._opened = opened.pop_all()

    def _set_up(self, opened: ExitStack) -> None:
        config, memory = self.config, self.memory
        if config.deterministic:
            make_deterministic()
        defer_horovod_stall_shutdown(config.stall_timeout)
        self.cluster = cluster = init(config.device)
        self.watchdog = Watchdog(cluster, config.stall_timeout)
        opened.callback(self.watchdog.close)
        self.preemption = Preemption(cluster, config.max_time, memory and memory.hosts_changed)
        require_same(cluster, "arguments", asdict(config))
        with raise_on_all_ranks(cluster):
            self.loader = make_loader(config, cluster)
            self.loader.steps_per_epoch(config.global_batch(cluster.size))  # refused before anything is written
            scaled = scale_for_ranks(config, cluster)
            self.model = build_model(config, self.loader)
            self.scaler = loss_scaler(config.precision, cluster.device)
        adam = make_adam(config, self.model, scaled)
        known = None if memory is None else memory.newest(cluster)
        with raise_on_all_ranks(cluster):
            self.folder, start = (
                run_dir.open_for(config, cluster.size, known) if cluster.rank == 0 else (None, None)
            )
            if start is not None:
                self._load(start, adam)
        began = _shared(start, cluster)
        self._divide(began)
        self.schedule = make_schedule(config, scaled.lr, self.steps_per_epoch, self.total_steps)
        self.optimizer = distribute(
            adam,
            self.model,
            strategy=config.strategy,
            accumulate=self.accumulate,
            compression=config.compression,
            op=config.op,
            max_grad_norm=config.max_grad_norm,
            loss_scaler=self.scaler,
        )
        self.forward = torch.compile(self.model) if config.compile else self.model
        torch.manual_seed(config.seed + 1 + cluster.rank)  # dropout differs between ranks; weights did not
        self.loss = RunningMean(cluster)
        self.watch = ThroughputMeter()
        self.step, self.epoch, self.epoch_done = 0, 1, False
        self.skipped, self.skipped_in_a_row = 0, 0  # updates left out because a gradient was not finite
        # Of the last update, until it is known whether it was: its step, epoch, and whether a loss was not finite.
        self.in_doubt: tuple[int, int, torch.Tensor] | None = None
        self.guard = BatchNormSnapshot(self.model)
        self.best_accuracy: float | None = None
        self.scores: Scores | None = None
        if began is not None:
            self._go_on(began)
        with raise_on_all_ranks(cluster):
            self.log = RunLog(self.folder, self.total_steps, None if start is None else self.step)
        opened.callback(self.log.close)
        self.saver = Saver(self.folder, config.keep, self.log)
        opened.callback(self.saver.close)
        self.resumed = None if start is None else replace(start, state=None)

    def _divide(self, began: Began | None) -> None:
        """Into updates, and each update's global batch into micro-batches.

        Where ranks come and go, an update keeps the images it had at the start of the run. Ranks that are missing
        are made up for by more micro-batches, none of them larger than they were.
        """
        config, size = self.config, self.cluster.size
        if began is None or not config.elastic:
            self.global_batch, self.accumulate = config.global_batch(size), config.accumulate
            self.micro_batch = -(-self.global_batch // (size * self.accumulate))
        else:
            self.global_batch = began.progress["global_batch_size"]
            self.micro_batch = began.progress["micro_batch_size"]
            self.accumulate = -(-self.global_batch // (size * self.micro_batch))
        self.steps_per_epoch = self.loader.steps_per_epoch(self.global_batch)
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)

    def _load(self, start: Start, adam: Adam) -> None:
        """Takes up a checkpoint on rank 0, before `distribute` gives it to the others."""
        require_same_tensors(self.model.state_dict(), start.state.model, str(start.path))
        self.model.load_state_dict(start.state.model)
        adam.load_state_dict(start.state.optimizer)
        for group in adam.param_groups:  # how it computes is this run's to say
            group["implementation"] = self.config.implementation
        if self.scaler is not None:
            self.scaler.load_state_dict(start.state.loss_scaler)

    def _go_on(self, began: Began) -> None:
        """Goes on from rank 0's checkpoint on all ranks; model and optimizer have it already."""
        progress, ranks = began.progress, began.ranks
        self.schedule = replace(self.schedule, **began.schedule)
        self.step, self.epoch = progress["step"], progress["epoch"]
        # --max-steps may have ended that run within an epoch, and now allow more.
        whole = self.step in (self.epoch * self.steps_per_epoch, self.total_steps)
        self.epoch_done = progress["epoch_done"] and whole
        self.optimizer.skipped_updates = self.skipped = progress["skipped"]
        self.skipped_in_a_row = progress["skipped_in_a_row"]
        self.best_accuracy = progress["best_accuracy"]
        self.scores = None if progress["scores"] is None else Scores(**progress["scores"])
        if len(ranks) == self.cluster.size:
            restore_rng_state(ranks[self.cluster.rank], self.cluster)
            self.loss.restore(*ranks[self.cluster.rank]["loss"])
            return
        torch.manual_seed((self.config.seed + 1 + self.cluster.rank + self.step * 2**20) % 2**63)
        if self.cluster.rank == ROOT:
            self.loss.restore(*map(sum, zip(*(rank["loss"] for rank in ranks), strict=True)))

    def run(self) -> None:
        """Trains, evaluates, and leaves a checkpoint and a plot in the run folder."""
        with self._opened:
            self._announce()
            if self.memory is not None:
                self.memory.commit(self._state(of_all=False))
            while not (self.epoch_done and self.step >= self.total_steps):
                self._run_epoch()
            self._finish()

    def _announce(self) -> None:
        config, cluster = self.config, self.cluster
        facts = {"world_size": cluster.size, "launcher": cluster.launcher, **self._facts()}
        if self.resumed is None:
            self.log.event("start", 0, 0, **facts)
        else:
            self.log.event("resume", self.step, self.epoch, path=str(self.resumed.path), **facts)
        self.log.say(
            f"hvd_adam {hvd_adam.__version__}: {config.model} on {config.dataset}, {cluster.size} rank(s) on "
            f"{cluster.device.type}, {self.global_batch} images per update, {self.total_steps} updates"
        )
        if self.resumed is not None:
            for warning in self.resumed.damaged:
                self.log.say(f"warning: {warning}")
            self.log.say(f"goes on after {self.step} updates from {self.resumed.path}")

    def _run_epoch(self) -> None:
        """An epoch, or what is left of it, with its evaluation and checkpoint."""
        config = self.config
        if self.epoch_done:
            self.epoch, self.epoch_done = self.epoch + 1, False
        self._train(self.epoch)
        last = self.step >= self.total_steps
        best = (last or self.epoch % config.eval_every == 0) and self._evaluate(self.epoch)
        self.epoch_done = True
        if best or last or config.checkpoint_every is None or self._is_due(config.checkpoint_every):
            self._checkpoint(best=best)

    def _train(self, epoch: int) -> None:
        """One epoch, or what `max_steps` leaves of it."""
        config, cluster = self.config, self.cluster
        self.model.train()
        self.watch.start()
        batches = self.loader.train_batches(
            config.seed,
            epoch - 1,
            global_batch_size=self.global_batch,
            rank=cluster.rank,
            size=cluster.size,
            accumulate=self.accumulate,
            first_step=self.step - (epoch - 1) * self.steps_per_epoch,
        )
        end = min(epoch * self.steps_per_epoch, self.total_steps)
        while self.step < end:
            self.preemption.ask()
            self._update([next(batches) for _ in range(self.accumulate)], epoch)
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                self._log_step(epoch)
            if self._is_due(config.check_consistency_every):
                require_consistent(cluster, self.model, self.optimizer, sharded=config.strategy == "sharded")
            if self.preemption.should_stop():
                self._stop()
            if self.memory is not None:
                self._commit()
            if self.step < end and self._is_due(config.checkpoint_every):
                self._checkpoint()
            self.saver.report(self.step, self.epoch)
        self.watch.pause()

    def _update(self, micro_batches: list[Batch], epoch: int) -> None:
        """One update from this rank's micro-batches."""
        self.watchdog.beat(f"update {self.step + 1}")
        rate = learning_rate(self.step, self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        self.guard.remember()
        bad = torch.zeros(1, dtype=torch.int32, device=self.cluster.device)
        for number, (images, labels) in enumerate(micro_batches, start=1):
            with autocast(self.config.precision, self.cluster.device):
                logits = self.forward(images)
            loss = F.cross_entropy(logits.to(self.loader.dtype), labels)
            # An infinite loss may have finite gradients: 0 · ∞ is NaN, and makes every one of them NaN. The weight
            # is 1, but for ranks that share a batch unevenly: so that each image counts as much as any other.
            weight = len(images) * self.cluster.size * self.accumulate / self.global_batch
            share = loss * (loss.detach() * 0 + weight)  # given to backward() it would have that import sympy
            (share if self.scaler is None else self.scaler.scale(share)).backward()
            if number == len(micro_batches):
                self._record_skip()  # now a GPU has all of this update's passes still to do
            self.optimizer.step()
            self.loss.add(loss, len(images))
            bad |= ~loss.detach().isfinite()
        self.guard.restore(self.optimizer.skipped)
        self.step += 1
        self.in_doubt = self.step, epoch, bad
        self.watch.add(self.global_batch)

    def _record_skip(self) -> None:
        """Takes note of whether the last update was skipped; ends the job if that were too many in a row."""
        if self.in_doubt is None:
            return
        (step, epoch, bad), self.in_doubt = self.in_doubt, None
        before, self.skipped = self.skipped, self.optimizer.skipped_updates
        if self.skipped == before:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        if self.cluster.size > 1:
            bad = horovod().allgather(bad, name="hvd_adam.bad")
        ranks = bad.nonzero().flatten().tolist()
        reason = f"loss of rank {', '.join(map(str, ranks))} not finite" if ranks else "gradient not finite"
        self.log.event("skip", step, epoch, reason=reason, skipped=self.skipped)
        if self.skipped_in_a_row <= self.config.max_skipped:
            return
        with raise_on_all_ranks(self.cluster):
            self.saver.report(self.step, self.epoch, wait=True)
        raise JobError(
            f"{self.skipped_in_a_row} updates in a row were skipped, the last one, update {step}, with the "
            f"{reason}; weights and checkpoints are good: look at the data, lower --lr, or raise --max-skipped"
        )

    def _log_step(self, epoch: int) -> None:
        self._record_skip()
        loss = self.loss.read()  # waits for the device, so that the lap counts finished work
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.event("step", self.step, epoch, loss=loss, lr=rate, images_per_second=self.watch.lap())

    def _evaluate(self, epoch: int) -> bool:
        """Scores the model; says whether it is the best so far."""
        broadcast_buffers(self.model, self.cluster)
        self.model.eval()
        scores = self.scores = score(self._predict, self.loader, self.cluster)
        values = asdict(scores)
        if self.config.positive_class is None:
            del values["test_balanced_accuracy"]
        self.log.event("eval", self.step, epoch, world_size=self.cluster.size, **values)
        best = self.best_accuracy is None or scores.test_accuracy > self.best_accuracy
        if best:
            self.best_accuracy = scores.test_accuracy
        return best

    def _predict(self, images: torch.Tensor) -> torch.Tensor:
        self.watchdog.beat(f"the evaluation after update {self.step}")
        with autocast(self.config.precision, self.cluster.device):
            return self.model(images)

    # Checkpoints.

    def _commit(self) -> None:
        """Copies the state to memory at its intervals; leaves the run, on every rank, when hosts have changed."""
        if self.preemption.regroup or self._is_due(self.config.commit_every):
            self.memory.commit(self._state(of_all=False))
        if self.preemption.regroup:
            raise MembershipChanged

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _checkpoint(self, *, best: bool = False) -> None:
        """Begins to write; every rank calls it. Waits for the one before: a slow disk slows training down."""
        self.watchdog.beat(f"the checkpoint after update {self.step}")
        self.saver.write(self._state(), best=best)

    def _stop(self) -> None:
        """Saves and leaves; no rank before rank 0 has written, for the launcher would end it."""
        self._checkpoint()
        with raise_on_all_ranks(self.cluster):
            path = self.saver.record(self.step, self.epoch, wait=True)
            self.log.say(f"stopped after {self.step} updates, {path}: the same command goes on")
        raise Preempted

    def _state(self, *, of_all: bool = True) -> TrainingState:
        """All that a resume needs; every rank calls it.

        Args:
            of_all: for rank 0 to save; otherwise for this rank to keep, whose entry alone `ranks` then has.
        """
        self._record_skip()
        own = rank_state(self.cluster, self.loss.part())
        progress = {
            "step": self.step,
            "epoch": self.epoch,
            "epoch_done": self.epoch_done,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best_accuracy": self.best_accuracy,
            "scores": None if self.scores is None else asdict(self.scores),
            "global_batch_size": self.global_batch,
            "micro_batch_size": self.micro_batch,
        }
        return TrainingState(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict_on_root() if of_all else self.optimizer.state_dict(),
            loss_scaler=None if self.scaler is None else self.scaler.state_dict(),
            progress=progress,
            schedule={"initial": self.schedule.initial, "peak": self.schedule.peak},
            ranks=gather_rank_states(self.cluster, own) if of_all else [own],
            config=asdict(self.config),
            data={
                "classes": list(self.loader.data.classes),
                "mean": list(self.loader.mean),
                "std": list(self.loader.std),
            },
        )

    def _finish(self) -> None:
        scores, rate = self.scores, self.watch.total()
        self.watchdog.beat("the end of the training")
        with raise_on_all_ranks(self.cluster):
            self.saver.record(self.step, self.epoch, wait=True)
        result = {"test_accuracy": scores.test_accuracy, "test_loss": scores.test_loss}
        if self.config.positive_class is not None:
            result["test_balanced_accuracy"] = scores.test_balanced_accuracy
        size = self.cluster.size
        self.watchdog.close()
        self.log.event("end", self.step, self.epoch, **result, images_per_second=rate, world_size=size)
        if self.folder is not None:
            path = storage.folder_of(self.folder / "checkpoints", self.step)
            for name, value in result.items():
                self.log.say(f"{name.replace('_', ' ')} {value:.4f}")
            self.log.say(f"throughput {rate:.0f} images/s over {self.cluster.size} rank(s)")
            self.log.say(f"checkpoint {path}\nplot {self._plot()}\nrun folder {self.folder}")

    def _plot(self) -> Path | str:
        try:
            return plot(self.folder)
        except OSError as error:  # on a full disk; all that it shows is in the metrics
            return f"not drawn: {error.strerror}"

    def _facts(self) -> dict[str, object]:
        versions = {"hvd_adam": hvd_adam.__version__, "torch": torch.__version__}
        return {"global_batch_size": self.global_batch, "total_steps": self.total_steps, "versions": versions}


@dataclass(frozen=True)
class Began:
    """What all ranks need to know of the state that rank 0 goes on from, beside model and optimizer."""

    progress: dict[str, Any]
    schedule: dict[str, float]
    ranks: list[dict[str, Any]]


def _shared(start: Start | None, cluster: Cluster) -> Began | None:
    """What rank 0 goes on from, on every rank."""
    state = None if start is None else start.state
    began = None if state is None else Began(state.progress, state.schedule, state.ranks)
    return horovod().broadcast_object(began, ROOT, name="hvd_adam.start") if cluster.size > 1 else began
