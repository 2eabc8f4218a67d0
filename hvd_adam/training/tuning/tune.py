"""`tune`: times updates of a copy of the model with each of the options that `--tune` may choose."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from hvd_adam.checkpoint.random_states import random_state, restore_random_state
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.automatic.candidates import candidates
from hvd_adam.distributed.automatic.timer import UpdateTimer, agreed_laps
from hvd_adam.distributed.automatic.trial import WARM_UP, Lap, Trial
from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import Preempted, UserError
from hvd_adam.log import logger
from hvd_adam.models.precision import loss_scaler
from hvd_adam.schedule import LearningRateSchedule, Scaled
from hvd_adam.training import run_dir
from hvd_adam.training.builders import distributed, make_adam
from hvd_adam.training.run import BatchSizes, Parts, Run
from hvd_adam.training.run_log import METRICS_FILE, read_events
from hvd_adam.training.tuning.options import Choice, Options, command_line, stages
from hvd_adam.training.update import Updater

NAME = "hvd_adam.tune"  # of the collectives


def tune(parts: Parts, config: TrainConfig, scaled: Scaled) -> Choice:
    """Measures the options that `--tune` may choose. Every rank must call it, and gets the same choice.

    A copy of the model is updated with a learning rate of 0, always with the same batch. The model and the random
    generators are not changed. The copy and its optimizer need memory until the choice is made.

    Args:
        parts: of the run.
        config: its configuration.
        scaled: hyper-parameters of Adam.

    Raises:
        Preempted: the job was asked to stop.
        UserError: the model cannot be copied; raised on every rank.
    """
    device = parts.cluster.device
    before = random_state(device)
    with raise_on_all_ranks(parts.cluster):
        try:
            model = copy.deepcopy(parts.model)
        except Exception as error:  # of the user's own code, which may raise anything
            raise UserError(
                f"--tune cannot copy the model, as copy.deepcopy does: {error!r}; leave it out"
            ) from None
    copied = replace(parts, model=model, scaler=loss_scaler(config.precision, device), ema=None)
    choice = Tuning(copied, config, scaled).choose()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    restore_random_state(before, device)
    if parts.cluster.rank == ROOT:
        logger.info(choice.summary())
    return choice


def earlier_choice(config: TrainConfig, cluster: Cluster) -> Choice | None:
    """Returns what the run that is resumed has chosen with as many ranks, or None. Every rank must call it."""
    choice = None
    if cluster.rank == ROOT and run_dir.resumes(config):
        metrics = Path(str(config.output_dir)) / METRICS_FILE
        events = read_events(metrics) if metrics.exists() else []  # the user may have removed the file
        choices = [Choice(**event["tune"]) for event in events if event.get("tune") is not None]
        choice = choices[-1] if choices else None
        if choice is not None and (choice.ranks, choice.allowed) != (cluster.size, config.tune):
            choice = None
        if choice is not None:
            logger.info(
                f"tune: uses {command_line(choice.options)}, which this run has chosen: nothing is measured"
            )
    if cluster.size > 1:
        choice = horovod().broadcast_object(choice, ROOT, name=f"{NAME}.earlier")
    return choice


class Tuning:
    """Makes updates with different options, and times them.

    Args:
        parts: of the run, with the copy of the model.
        config: its configuration.
        scaled: hyper-parameters of Adam.
    """

    def __init__(self, parts: Parts, config: TrainConfig, scaled: Scaled) -> None:
        self._parts, self._cluster, self._allowed = parts, parts.cluster, config.tune
        self._config, self._scaled = replace(config, tune="off"), scaled._replace(lr=0.0)
        self._sizes = sizes = BatchSizes.of_run(config, parts.loader, self._cluster.size, None)
        batches = parts.loader.train_batches(
            config.seed,
            0,
            global_batch_size=sizes.global_batch,
            rank=self._cluster.rank,
            size=self._cluster.size,
            accumulate=sizes.accumulate,
        )
        self._micro_batches = list(islice(batches, sizes.accumulate))

    def choose(self) -> Choice:
        """Compares all options that are allowed."""
        chosen: Options = {}
        seconds: dict[str, float] = {}
        warm_up = WARM_UP
        for stage in self._stages():
            compared = {command_line(options): options for options in ({**chosen, **more} for more in stage)}
            trial = Trial(list(compared), warm_up)
            while not trial.is_over:
                trial.add(self.updates(compared[trial.compression], trial.block))
            seconds |= {name: trial.seconds(name) for name in compared}
            chosen, warm_up = compared[trial.compression], 0
        return Choice(self._allowed, self._cluster.size, dict(chosen), seconds)

    def _stages(self) -> Iterator[Sequence[Options]]:
        trained = [p for p in self._parts.model.parameters() if p.requires_grad]
        several = self._cluster.size > 1
        return stages(
            candidates("auto:any" if self._allowed == "any" else "auto:lossless", {p.dtype for p in trained}),
            ("allreduce", "sharded") if several and self._can_be_sharded() else ("allreduce",),
            ranks=self._cluster.size,
            threads=1 if self._cluster.device.type == "cuda" else torch.get_num_threads(),
            gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        )

    def _can_be_sharded(self) -> bool:
        """Returns whether the parameters can be; logs why not."""
        try:
            self._updater({"strategy": "sharded"})
        except UserError as error:
            if self._cluster.rank == ROOT:
                logger.info(f"tune: without --strategy sharded: {error}")
            return False
        return True

    def updates(self, options: Options, number: int) -> list[Lap]:
        """Makes updates with some options; returns their times, the same on all ranks."""
        self._parts.watchdog.beat(f"tuning: {command_line(options)}")
        self._parts.preemption.ask()
        if self._parts.preemption.should_stop():
            raise Preempted
        with _threads(options.get("threads")):
            updater = self._updater(options)
            timer = UpdateTimer(self._cluster.device, lambda: 0.0)
            for update in range(number):
                updater.update(self._micro_batches, update, lambda: None)
                timer.lap(counts=True)
            laps = agreed_laps(timer.take(), NAME)
        del updater
        gc.collect()  # hooks and optimizers refer to each other, and hold gradients and state
        return laps

    def _updater(self, options: Options) -> Updater:
        config, parts, sizes = replace(self._config, **options), self._parts, self._sizes
        adam = make_adam(config, parts.model, self._scaled)
        optimizer = distributed(config, adam, parts.model, sizes.accumulate, self._cluster, parts.scaler)
        schedule = LearningRateSchedule(peak=0.0, total_steps=1)
        run = Run(**vars(parts), config=config, sizes=sizes, optimizer=optimizer, schedule=schedule)
        return Updater(run, config.precision, compiled=config.compile)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Context with a number of threads of PyTorch; None for as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
