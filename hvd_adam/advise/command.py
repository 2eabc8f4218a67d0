"""`advise`: from a run folder to a table of settings, and what to use."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvd_adam import log
from hvd_adam.advise import record as records
from hvd_adam.advise.advice import Advice, Basis, options_for
from hvd_adam.advise.choice import Setting, by_factors_of_2, settings
from hvd_adam.advise.record import Record
from hvd_adam.advise.report import as_json, text
from hvd_adam.advise.step_time import Measured, Model, StepTime
from hvd_adam.config import AdviseConfig
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.errors import UserError
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules
from hvd_adam.simulate.config import MOST_RANKS
from hvd_adam.simulate.config import PredictConfig as ScalingConfig
from hvd_adam.simulate.predict import job_of
from hvd_adam.simulate.step import WIRE_BYTES

if TYPE_CHECKING:
    from hvd_adam.advise.branches import Branches
    from hvd_adam.advise.confirm import Verdict


def advise(config: AdviseConfig) -> None:
    """Writes the advice to stdout.

    Raises:
        UserError: a launcher started several ranks; the run folder cannot be read or lacks measurements; the
            calibration does not fit; or a branch fails.
    """
    require_no_launcher()
    log.setup(info_on_stderr=True)
    job = _Job.of(config, records.read(config.run[0]))
    # First: in the import of a compiled module, the exception of a signal handler could be lost.
    branches = _branches(config, job) if config.measure or config.confirm else None
    with _unwound_by_signals():
        measured = _measured(config, job, branches)
        times: StepTime = measured if job.scaling is None else _model(job.record, job.scaling, measured)
        basis, base = _basis(config), job.here if measured.line is not None else job.own
        advice = Advice.of(job.record, base, basis, job.found, times)
        _log_unknown(config, advice)
        verdict = None if branches is None or not config.confirm else _confirmed(config, job, branches, advice)
    shown = as_json if config.json else text
    log.write_result(shown(advice, config.price, verdict))


@dataclass(frozen=True)
class _Job:
    """What is asked.

    Attributes:
        record: the run.
        own: its setting.
        here: its setting on the ranks of branches.
        found: settings to choose from.
        scaling: what the cost model is asked; None without --calibration.
    """

    record: Record
    own: Setting
    here: Setting
    found: list[Setting]
    scaling: ScalingConfig | None

    @classmethod
    def of(cls, config: AdviseConfig, record: Record) -> _Job:
        """Returns the job; checks everything that can be checked before anything is measured.

        Raises:
            UserError: no batch fits, or the calibration does not.
        """
        own = Setting(record.ranks, record.micro_batch, record.accumulate, record.global_batch)
        if config.most_samples is not None and config.most_samples < own.micro_batch:
            raise UserError(f"--most-samples {config.most_samples}: the run itself has {own.micro_batch}")
        scaling = _scaling(config, record)
        here = own if config.np in (None, record.ranks) else _on_ranks(own, int(config.np or 0))
        measures = _measures(config)
        ranks = {here.ranks} if measures else {own.ranks}
        if config.calibration is not None:
            ranks |= {n for n in config.rank_list() or by_factors_of_2(own.ranks) if n <= MOST_RANKS}
            ranks |= {here.ranks, own.ranks}
        most = record.train_samples
        batches = [
            b for b in config.batch_list() or by_factors_of_2(own.global_batch) if most is None or b <= most
        ]
        if not batches:
            raise UserError(f"--batches {config.batches}: an epoch of {record.folder} has only {most} samples")
        keep = not measures and config.calibration is None
        base = here if measures else own
        found = settings(batches, sorted(ranks), base, config.most_samples, keep_micro_batch=keep)
        reason = "more than an epoch, or no whole number of equal micro-batches on any number of ranks"
        _require_usable("batches", config.batch_list(), {each.global_batch for each in found}, reason)
        _require_usable("ranks", config.rank_list(), {each.ranks for each in found}, "no batch divides by them")
        options_for(record, base)
        options_for(record, here)
        found = _with_learning_rates(
            record, sorted({*found, here}, key=lambda each: (each.ranks, each.global_batch))
        )
        return cls(record, own, here, found, scaling)


def _require_usable(name: str, wanted: Sequence[int], usable: Collection[int], reason: str) -> None:
    """Logs which of the numbers that an option has cannot be used; raises UserError if none can."""
    unusable = [number for number in wanted if number not in usable]
    if not unusable:
        return
    text = f"--{name} {','.join(map(str, unusable))}: {reason}"
    if len(unusable) == len(wanted):
        raise UserError(f"{text}: give others")
    log.logger.info(f"left out: {text}")


def _log_unknown(config: AdviseConfig, advice: Advice) -> None:
    known = {row.global_batch for row in advice.rows}
    if unknown := [str(batch) for batch in config.batch_list() if batch not in known]:
        log.logger.info(f"not in the table: --batches {','.join(unknown)}, of which no time is known")


def _with_learning_rates(record: Record, found: list[Setting]) -> list[Setting]:
    """Returns the settings that --lr-scaling can scale to, and logs why others are left out."""
    kept, reasons = [], {}
    for setting in found:
        try:
            options_for(record, setting)
            kept.append(setting)
        except UserError as error:
            reasons[setting] = str(error)
    if reasons:
        batches = ",".join(map(str, sorted({setting.global_batch for setting in reasons})))
        reason = next(iter(reasons.values()))
        log.logger.info(f"left out: {len(reasons)} settings with batches {batches}: {reason}")
    return kept


def _on_ranks(own: Setting, ranks: int) -> Setting:
    share, rest = divmod(own.global_batch, ranks * own.accumulate)
    if rest or not share:
        raise UserError(
            f"--np {ranks}: the {own.global_batch} samples of an update do not divide by {ranks} ranks × "
            f"{own.accumulate} micro-batches"
        )
    return Setting(ranks, share, own.accumulate, own.global_batch)


def _measures(config: AdviseConfig) -> bool:
    """Returns whether updates are measured: --confirm alone needs them to choose its candidates."""
    return config.measure or (config.confirm and config.calibration is None)


def _basis(config: AdviseConfig) -> Basis:
    if config.calibration is None:
        return "measured" if _measures(config) else "run"
    return "calibration and measured" if _measures(config) else "calibration"


def _scaling(config: AdviseConfig, record: Record) -> ScalingConfig | None:
    """Returns the options of the prediction, checked.

    Raises:
        UserError: the calibration cannot be read, or does not have the model of the run.
    """
    if config.calibration is None:
        return None
    strategy = str(record.config.get("strategy", "allreduce"))
    if record.compression not in WIRE_BYTES:
        raise UserError(f"{record.folder}/metrics.jsonl has compression {record.compression!r}: give another run")
    scaling = ScalingConfig(
        calibration=config.calibration,
        model=str(record.config.get("model")),
        ranks_per_host=config.ranks_per_host,
        network=config.network,
        bandwidth=config.bandwidth,
        strategy="sharded" if strategy == "sharded" else "allreduce",
        compression=record.compression,  # type: ignore[arg-type]  # as the run has logged it
    )
    elements = job_of(scaling)[0].elements
    measured = f"--calibration {config.calibration}: its {scaling.model} has {elements:,} parameters"
    if record.parameters is None:
        log.logger.info(f"{measured}; {record.folder} does not record its own number")
    elif record.parameters != elements:
        raise UserError(
            f"{measured}, that of {record.folder} {record.parameters:,}: calibrate with the --image-size, "
            "--channels and --classes of the run's data"
        )
    return scaling


def _model(record: Record, scaling: ScalingConfig, measured: Measured) -> Model:
    workload, machine, per_host, _ = job_of(scaling)
    return Model(workload, machine, per_host, scaling.strategy, scaling.compression, measured)


def _branches(config: AdviseConfig, job: _Job) -> Branches:
    require("matplotlib", "tensorboard")
    with loading_modules():  # here: an advice without branches needs no torch
        from hvd_adam.advise.branches import Branches, Launcher

    branches = Branches(job.record, Launcher(job.here.ranks, config.launcher))
    if config.confirm:
        branches.require_learning_rate()
    return branches


def _measured(config: AdviseConfig, job: _Job, branches: Branches | None) -> Measured:
    record = job.record
    if branches is None or not _measures(config):
        return Measured(record.ranks, record.micro_batch, record.accumulate, record.seconds)
    from hvd_adam.advise.measure import measure  # here: it needs torch

    return measure(branches, job.found, job.here, log.logger.info)


def _confirmed(config: AdviseConfig, job: _Job, branches: Branches, advice: Advice) -> Verdict:
    from hvd_adam.advise.confirm import confirm  # here: it needs torch

    return confirm(branches, advice.rows, job.here, config.candidates, config.samples, log.logger.info)


@contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end branches and remove their folders, as Ctrl-C does."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
