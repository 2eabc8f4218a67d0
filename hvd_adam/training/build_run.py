"""`build_run`: builds all parts of a run on every rank, in the order that the collectives require."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hvd_adam.checkpoint.residuals import restore_unsent
from hvd_adam.checkpoint.state import naming_part, require_same_tensors
from hvd_adam.config import TrainConfig
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.context import Cluster, horovod, init
from hvd_adam.errors import Preempted
from hvd_adam.log import logger
from hvd_adam.models.precision import loss_scaler, make_deterministic
from hvd_adam.optim.adam import Adam
from hvd_adam.recovery.elastic import InMemoryCheckpoint
from hvd_adam.recovery.preemption import Preemption, stop_requested
from hvd_adam.recovery.watchdog import Watchdog, defer_horovod_stall_shutdown
from hvd_adam.schedule import Scaled
from hvd_adam.training import run_dir
from hvd_adam.training.builders import (
    build_model,
    distributed,
    make_adam,
    make_loader,
    make_schedule,
    scale_for_ranks,
    try_out,
)
from hvd_adam.training.objective import Objective
from hvd_adam.training.run import BatchSizes, Parts, Run
from hvd_adam.training.run_dir import ResumePoint
from hvd_adam.training.tuning.options import Choice
from hvd_adam.training.tuning.tune import earlier_choice, tune
from hvd_adam.training.weights.ema import ModelAverage
from hvd_adam.training.weights.warm_start import warm_start

STALL_REMEDY = (
    "The same command with the run folder as --output-dir resumes from the last checkpoint; if the job was only "
    "slow, use a longer --stall-timeout"
)


def build_run(config: TrainConfig, memory: InMemoryCheckpoint | None, resources: ExitStack) -> Run:
    """Builds a run and loads the state from which it resumes; every rank must call it.

    Args:
        config: the run's configuration; identical on all ranks.
        memory: this rank's state in memory in an elastic run, else None.
        resources: receives what must be closed at the end of the run.

    Raises:
        UserError: the configuration does not fit the data, the machine or the ranks; raised on every rank.
    """
    parts, scaled = build_parts(config, memory, resources)
    cluster, loader = parts.cluster, parts.loader
    choice = None
    if config.tune != "off":
        choice = earlier_choice(config, cluster) or _tune(parts, config, scaled)
        config = replace(config, tune="off", **choice.options)
        _use_threads(config)
    adam = make_adam(config, parts.model, scaled)
    folder, resume, unsent = _open_run(config, memory, parts, adam)
    sizes = BatchSizes.of_run(config, loader, cluster.size, resume)
    schedule = make_schedule(config, scaled.lr, sizes.steps_per_epoch, sizes.total_steps)
    if resume is not None:  # maybe with another number of ranks, which would scale the rates differently
        saved = resume.state.schedule
        schedule = replace(schedule, initial=saved["initial"], peak=saved["peak"])
    optimizer = distributed(config, adam, parts.model, sizes.accumulate, cluster, parts.scaler)
    if resume is not None:
        restore_unsent(optimizer, *unsent, resume.path)
    if parts.ema is not None:
        parts.ema.start(cluster, saved=resume is not None and resume.state.config.get("ema") is not None)
    return Run(
        **vars(parts),
        config=config,
        sizes=sizes,
        optimizer=optimizer,
        schedule=schedule,
        choice=choice,
        folder=folder,
        resume=resume,
    )


def build_parts(
    config: TrainConfig, memory: InMemoryCheckpoint | None, resources: ExitStack
) -> tuple[Parts, Scaled]:
    """Builds what needs no run folder, and Adam's hyper-parameters; checks that the ranks agree."""
    if config.deterministic:
        make_deterministic()
    defer_horovod_stall_shutdown(config.stall_timeout)
    cluster = _init(config)
    watchdog = Watchdog(cluster, config.stall_timeout, STALL_REMEDY)
    resources.callback(watchdog.close)
    hosts_changed = None if memory is None else memory.hosts_changed
    most_updates = config.local_steps if config.strategy == "local" and config.islands is None else 1
    preemption = Preemption(cluster, config.max_time, hosts_changed, most_updates=most_updates)
    require_same(cluster, "arguments", asdict(config))

    def progress(doing: str) -> None:
        watchdog.beat(doing)
        if stop_requested():
            raise Preempted

    with raise_on_all_ranks(cluster):
        loader = make_loader(config, cluster, progress)  # the number of its workers follows the default threads
        _use_threads(config)
        loader.steps_per_epoch(config.global_batch(cluster.size))  # raises before anything is written
        scaled = scale_for_ranks(config, cluster)
        model = build_model(config, loader)
        objective = Objective.of(asdict(config), loader.dtype)
        try_out(objective, config, model, loader)
        ema = None if config.ema is None else ModelAverage(model, config.ema)
        scaler = loss_scaler(config.precision, cluster.device)
    require_same(cluster, "data", loader.description())
    return Parts(cluster, watchdog, preemption, loader, model, objective, ema, scaler), scaled


def _init(config: TrainConfig) -> Cluster:
    if config.strategy == "local" and config.islands is None:
        # Collectives are rare. With Horovod's looks 2 ms apart, the cnn sends six times as much for them as for
        # its meetings, H = 50 (docs/local_steps_measured.md).
        return init(config.device, cycle_time_ms=10)
    return init(config.device, process_sets=config.islands is not None)


def _tune(parts: Parts, config: TrainConfig, scaled: Scaled) -> Choice:
    with raise_on_all_ranks(parts.cluster):
        folder = run_dir.run_folder(config)
        # Refuses a wrong --resume before the measurement. A folder with a run is not locked yet.
        if parts.cluster.rank == ROOT and not run_dir.holds_run(folder):
            batch = config.global_batch(parts.cluster.size)
            run_dir.find_resume_point(config, folder, batch, parts.loader.description())
    return tune(parts, config, scaled)


def _use_threads(config: TrainConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _open_run(
    config: TrainConfig, memory: InMemoryCheckpoint | None, parts: Parts, adam: Adam
) -> tuple[Path | None, ResumePoint | None, tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Opens the run folder and loads the state to start from on rank 0; broadcasts the resume point.

    Returns:
        The folder; the resume point, without tensors; on rank 0, the residuals and islands to start from.
    """
    cluster, data = parts.cluster, parts.loader.description()
    in_memory = None if memory is None else memory.newest(cluster)
    folder: Path | None = None
    resume: ResumePoint | None = None
    residuals = islands = None
    with raise_on_all_ranks(cluster):
        if cluster.rank == ROOT:
            loaded = None
            if config.init_from is not None and in_memory is None and not run_dir.resumes(config):
                loaded = warm_start(parts.model, config.init_from)  # first: an error leaves no folder behind
            folder, resume = run_dir.open_run(config, cluster.size, in_memory, data)
            if config.init_from is not None and resume is None:
                # The folder may hold a run that was killed before its first checkpoint.
                logger.info(loaded or warm_start(parts.model, config.init_from))
        if resume is not None:
            before = resume.state.config.get("state_format", config.state_format)
            if before != config.state_format and cluster.rank == ROOT:
                logger.info(f"the optimizer state was held as {before} and continues as {config.state_format}")
            _load(parts, adam, resume, config.implementation)
            residuals, islands = resume.state.residuals, resume.state.islands
            resume = resume.without_tensors()
    if cluster.size > 1:
        resume = horovod().broadcast_object(resume, ROOT, name="hvd_adam.start")
    return folder, resume, (residuals, islands)


def _load(parts: Parts, adam: Adam, resume: ResumePoint, implementation: str) -> None:
    """Loads the state of a resumed run on rank 0, before `distribute` broadcasts it.

    Args:
        parts: with the model, the loss scaler and the averages, which are loaded.
        adam: is loaded.
        resume: where the run resumes.
        implementation: of Adam: that of this run, not of the saved one.
    """
    state = resume.state
    require_same_tensors(parts.model.state_dict(), state.model, resume.path)
    with naming_part("the model", resume.path):
        parts.model.load_state_dict(state.model)
    with naming_part("the optimizer", resume.path):
        adam.load_state_dict(state.optimizer)
    for group in adam.param_groups:
        group["implementation"] = implementation
    if parts.scaler is not None:
        with naming_part("the loss scaler", resume.path):
            parts.scaler.load_state_dict(state.loss_scaler)
    if parts.ema is not None and state.ema is not None:
        with naming_part("the moving average", resume.path):
            parts.ema.load_state_dict(state.ema)
