"""`Trainer`: the training loop over epochs and updates, with evaluation, checkpoints and the record of the run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.random_states import restore_random_state
from hvd_adam.checkpoint.state import Progress, TrainingState, naming_part, rank_state
from hvd_adam.checkpoint.writer import CheckpointWriter
from hvd_adam.config import TrainConfig
from hvd_adam.data.protocols import Batch
from hvd_adam.data.workers.random_state import seed_generators
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.consistency import require_consistent
from hvd_adam.distributed.local import training as local_training
from hvd_adam.errors import MembershipChanged, Preempted, UserError
from hvd_adam.log import logger
from hvd_adam.models.precision import autocast
from hvd_adam.recovery.elastic import InMemoryCheckpoint
from hvd_adam.recovery.failure import Failure
from hvd_adam.recovery.preemption import exit_on_second_signal
from hvd_adam.training import messages
from hvd_adam.training.best import BestCheckpoint
from hvd_adam.training.build_run import build_run
from hvd_adam.training.meters import ThroughputMeter
from hvd_adam.training.plots import try_plot
from hvd_adam.training.run_dir import ResumePoint, has_ended
from hvd_adam.training.run_log import RunLog, shown_scores
from hvd_adam.training.scores import mistakes_file
from hvd_adam.training.scores.mistakes import MOST_MISTAKES
from hvd_adam.training.scores.scoring import score
from hvd_adam.training.skip_tracker import SkipTracker
from hvd_adam.training.slow_ranks.monitor import SlowRankMonitor
from hvd_adam.training.update import Updater
from hvd_adam.training.weights.trainable import keep_frozen_statistics


class Trainer:
    """A training run. Every rank creates one and calls `run`.

    Args:
        config: the run's configuration; identical on all ranks.
        memory: in an elastic run, this rank's state in memory (see `recovery.elastic`); else None.

    Raises:
        UserError: the configuration does not fit the data, the machine or the ranks; raised on every rank.
    """

    def __init__(self, config: TrainConfig, memory: InMemoryCheckpoint | None = None) -> None:
        with ExitStack() as resources:  # an elastic run may fail here and start again: close everything then
            self.memory, run = memory, build_run(config, memory, resources)
            self.config = config = run.config
            self.cluster, self.watchdog, self.preemption = run.cluster, run.watchdog, run.preemption
            self.loader, self.model, self.scaler, self.ema = run.loader, run.model, run.scaler, run.ema
            self.optimizer, self.schedule, self.choice = run.optimizer, run.schedule, run.choice
            self.sizes, self.folder, self.resume, self.has_evaluated = run.sizes, run.folder, run.resume, False
            seed_generators(config.seed + 1 + self.cluster.rank)  # dropout differs between ranks
            self.objective, self.updater = run.objective, Updater(run, config.precision, compiled=config.compile)
            self.loss, self.throughput, self.progress = self.updater.mean_loss, ThroughputMeter(), Progress()
            if self.resume is not None:
                with naming_part("the progress or the state of a rank", self.resume.path):
                    self._restore(self.resume)
            self.progress.global_batch_size = self.sizes.global_batch
            self.progress.micro_batch_size = self.sizes.micro_batch
            with raise_on_all_ranks(self.cluster):
                first_step = None if self.resume is None else self.progress.step
                folder = None if self.folder and self.is_finished and has_ended(self.folder) else self.folder
                recent = [] if self.resume is None else self.resume.state.progress.get("events", [])
                classes = self.loader.data.classes
                self.log = RunLog(folder, self.sizes.total_steps, first_step, asdict(config), classes, recent)
                checkpoints = self.folder and self.folder / "checkpoints"
                self.checkpoints = CheckpointWriter(checkpoints, config.keep)
                self.best = BestCheckpoint(self.cluster, checkpoints, self.progress)
            resources.callback(self.log.close)
            self.skips = SkipTracker(self.cluster, self.optimizer, self.progress, self.log, config.max_skipped)
            self.slow_ranks = SlowRankMonitor(self.cluster, self.optimizer, self.watchdog.hosts, self._event)
            resources.callback(self.checkpoints.close)
            self._resources = resources.pop_all()

    def _restore(self, resume: ResumePoint) -> None:
        """Restores what `build_run` does not: progress, random generators, running mean. Every rank calls it."""
        state, cluster = resume.state, self.cluster
        self.progress = progress = self.sizes.resumed(Progress.from_dict(state.progress))
        self.optimizer.skipped_updates = progress.skipped
        if progress.global_batch_size == self.sizes.global_batch:
            self.optimizer.noise.load_state(progress.noise)
        if len(state.ranks) == cluster.size:
            restore_random_state(state.ranks[cluster.rank], cluster.device)
            self.loss.load_state(*state.ranks[cluster.rank]["loss"])
            return
        seed_generators((self.config.seed + 1 + cluster.rank + progress.step * 2**20) % 2**63)
        if cluster.is_root:
            self.loss.load_state(*map(sum, zip(*(rank["loss"] for rank in state.ranks), strict=True)))

    def run(self) -> None:
        """Trains and evaluates; writes the last checkpoint and the plot to the run folder."""
        with self._resources:
            self._log_start()
            if self.memory is not None:
                self.memory.commit(self._state(all_ranks=False))
            while not self.is_finished:
                self._run_epoch()
            self._finish()

    @property
    def is_finished(self) -> bool:
        """Whether all updates and the last evaluation are done."""
        return self.progress.epoch_done and self.progress.step >= self.sizes.total_steps

    def _log_start(self) -> None:
        config, cluster, sizes = self.config, self.cluster, self.sizes
        facts = messages.start_facts(config, cluster, sizes, self.loader, self.model, self.choice)
        if self.resume is None:
            self.log.event("start", 0, 0, **facts)
        else:
            self._event("resume", path=self.resume.path, checkpoint=self.resume.checkpoint, **facts)
        logger.info(messages.first_line(config, self.loader.data, cluster, sizes))
        if self.resume is not None:
            for damage in self.resume.damaged:
                logger.warning(damage)
            resumed = f"resuming after {self.progress.step} updates from {self.resume.path}"
            logger.info(messages.finished(config, sizes, self.progress.step) if self.is_finished else resumed)

    def _event(self, event: str, **values: object) -> None:
        """Records an event at the current step."""
        self.log.event(event, self.progress.step, self.progress.epoch, **values)

    def _run_epoch(self) -> None:
        """Runs an epoch, or the rest of it, then evaluates the model and writes a checkpoint."""
        config, progress = self.config, self.progress
        if progress.epoch_done:
            progress.epoch, progress.epoch_done = progress.epoch + 1, False
        self._train_epoch()
        progress.scores = None  # of fewer updates
        if last := progress.step >= self.sizes.total_steps:
            local_training.meet(self.optimizer)
        best = (last or progress.epoch % config.eval_every == 0) and self._evaluate()
        progress.epoch_done = True
        if best or last or config.checkpoint_every is None or self._is_due(config.checkpoint_every):
            self._checkpoint(best=best)

    def _train_epoch(self) -> None:
        """Makes the updates of an epoch, up to `max_steps`."""
        config, cluster, sizes, progress = self.config, self.cluster, self.sizes, self.progress
        self.model.train()
        if config.freeze is not None:
            keep_frozen_statistics(self.model)
        self.throughput.start()
        batches = self.loader.train_batches(
            config.seed,
            progress.epoch - 1,
            global_batch_size=sizes.global_batch,
            rank=cluster.rank,
            size=cluster.size,
            accumulate=sizes.accumulate,
            first_step=progress.step - (progress.epoch - 1) * sizes.steps_per_epoch,
        )
        batches = self.slow_ranks.timed(batches)
        end = min(progress.epoch * sizes.steps_per_epoch, sizes.total_steps)
        while progress.step < end:
            self.preemption.ask()
            self._update([next(batches) for _ in range(sizes.accumulate)])
            if sizes.is_logged(progress.step, config.log_every):
                self._log_step()
            if self._is_due(config.check_consistency_every):
                require_consistent(cluster, self.model, self.optimizer, sharded=config.strategy == "sharded")
            if self.preemption.should_stop():
                self._stop()
            if self.memory is not None:
                self._commit(self.memory)
            if progress.step < end and self._is_due(config.checkpoint_every):
                self._checkpoint()
            self._report_checkpoint()
        self.throughput.pause()

    def _update(self, micro_batches: list[Batch]) -> None:
        """Makes one update from this rank's micro-batches."""
        progress = self.progress
        self.watchdog.beat(f"update {progress.step + 1}")
        nonfinite = self.updater.update(micro_batches, progress.step, self._record_skip)
        progress.step += 1
        self.slow_ranks.update_ended()
        self.skips.add(nonfinite)
        self.throughput.add(self.sizes.global_batch)

    def _record_skip(self) -> None:
        """Records whether the last update was skipped; ends the job after too many skipped ones in a row."""
        if (error := self.skips.record()) is not None:
            with raise_on_all_ranks(self.cluster):
                self._report_checkpoint(wait=True)
            raise error

    def _log_step(self) -> None:
        self._record_skip()
        loss = self.loss.read()  # waits for the device, so that the lap counts finished work
        adam = self.optimizer
        values = {"lr": adam.param_groups[0]["lr"], "grad_norm": adam.finite_grad_norm()}
        values |= {"compression": adam.compression} | adam.noise.metrics(self.sizes.global_batch)
        self._event("step", loss=loss, **values, images_per_second=self.throughput.lap())

    def _evaluate(self) -> bool:
        """Evaluates the model, or its moving average; returns whether it is the best so far."""
        progress, model = self.progress, self.model if self.ema is None else self.ema.model
        model.eval()
        predict = partial(self._predict, model)
        with local_training.shared_weights(self.optimizer, model, self.cluster):
            size = self.config.eval_batch_size
            scores = score(predict, self.loader, self.cluster, self.objective, size, mistakes=MOST_MISTAKES)
        if scores.test_accuracy is None and not self.has_evaluated:
            logger.info(messages.NO_ACCURACY)
        progress.scores, self.has_evaluated = scores.as_dict(), True
        self._event("eval", world_size=self.cluster.size, **progress.scores)
        if self.folder is not None and scores.mistakes is not None:
            classes = self.loader.data.classes
            if problem := mistakes_file.try_write(self.folder, progress.step, scores.mistakes, classes):
                logger.warning(problem)
        self._report_checkpoint(wait=True)
        return self.best.is_best(scores.test_accuracy, scores.test_loss)

    def _predict(self, model: torch.nn.Module, inputs: torch.Tensor) -> Any:
        self.watchdog.beat(f"the evaluation after update {self.progress.step}")
        with autocast(self.config.precision, self.cluster.device):
            return model(inputs)

    def _commit(self, memory: InMemoryCheckpoint) -> None:
        """Copies the state to memory at its intervals; leaves the run, on every rank, after a change of hosts."""
        regroup, due = self.preemption.regroup, self._is_due(self.config.commit_every)
        if local_training.commits(self.optimizer, due, must=regroup):
            memory.commit(self._state(all_ranks=False))
        if regroup:
            raise MembershipChanged

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _checkpoint(self, *, best: bool = False) -> None:
        """Starts to write a checkpoint, after the previous one is written; every rank calls it."""
        self.watchdog.beat(f"the checkpoint after update {self.progress.step}")
        with self.slow_ranks.checkpoint():
            self._report_checkpoint(wait=True)  # first: a failure changes the best scores in the state
            state = self._state().as_dict()
            self.checkpoints.save(self.progress.step, state, best=best)

    def _report_checkpoint(self, *, wait: bool = False) -> None:
        """Records a completed checkpoint. A failed write is logged and training continues."""
        try:
            self._record_checkpoint(wait=wait)
        except UserError as error:
            self.best.failed()
            self._event("checkpoint_failed", reason=str(error))
            logger.warning(f"{error}; training continues")

    def _record_checkpoint(self, *, wait: bool) -> Path | None:
        """Records a completed checkpoint and returns its folder; raises UserError if it was not written."""
        path = self.checkpoints.result(wait=wait)
        if path is not None and self.folder is not None:
            self.best.written()
            step = storage.step_of(path)  # training has continued meanwhile
            self.log.event("checkpoint", step, self.sizes.epoch_of(step), path=str(path.relative_to(self.folder)))
        return path

    def _stop(self) -> None:
        """Writes a checkpoint and leaves. No rank leaves before rank 0 is done: the launcher would end it."""
        self._checkpoint()
        with raise_on_all_ranks(self.cluster):
            path = self._record_checkpoint(wait=True)
            logger.info(messages.stopped(self.config, self.folder, self.progress.step, path))
            exit_on_second_signal(Failure.of(stop := Preempted()).code)
        raise stop

    def _state(self, *, all_ranks: bool = True) -> TrainingState:
        """Returns the state that a resume needs; every rank calls it.

        Args:
            all_ranks: gather the state of all ranks, for rank 0 to save. Otherwise the state is for this rank
                only, `ranks` has only its entry, and `progress` has the last events.
        """
        self._record_skip()
        self.progress.noise = self.optimizer.noise.state()
        own = rank_state(self.cluster, self.loss.state())
        adam, feedback, residuals = self.optimizer, self.optimizer.error_feedback, None
        optimizer = adam.state_dict_on_root(held=True) if all_ranks else adam.held_state_dict()
        if feedback is not None:
            residuals = feedback.state_dict_on_root() if all_ranks else feedback.total_state_dict()
        return TrainingState(
            model=local_training.shared_state_dict(self.model, adam),
            optimizer=optimizer or {},  # on ranks other than 0, which do not save it
            loss_scaler=None if self.scaler is None else self.scaler.state_dict(),
            progress=asdict(self.progress) | ({} if all_ranks else {"events": [*self.log.recent]}),
            schedule={"initial": self.schedule.initial, "peak": self.schedule.peak},
            ranks=self.cluster.gather(own) if all_ranks else [own],
            config=asdict(self.config),
            data=self.loader.description(),
            ema=None if self.ema is None else self.ema.state_dict(),
            residuals=residuals,
            islands=local_training.islands_on_root(adam) if all_ranks else local_training.islands_in_memory(adam),
        )

    def _finish(self) -> None:
        scores, rate, size = self.progress.scores or {}, self.throughput.total() or None, self.cluster.size
        self.watchdog.beat("the end of the training")
        with raise_on_all_ranks(self.cluster):
            self._record_checkpoint(wait=True)
        result = shown_scores(scores, self.config.positive_class)
        self.watchdog.close()
        self._event("end", **result, images_per_second=rate, world_size=size)
        if self.folder is not None:
            path = storage.checkpoint_path(self.folder / "checkpoints", self.progress.step)
            if not self.has_evaluated:
                logger.info("  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items()))
            if rate is not None:
                logger.info(f"throughput {rate:.0f} images/s over {size} rank(s)")
            logger.info(f"checkpoint {path}\nplot {try_plot(self.folder)}\nrun folder {self.folder}")
