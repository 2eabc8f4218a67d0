"""`predict`: from a calibration or a preset to a table, a plot and a page. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.errors import UserError
from hvd_adam.log import write_result
from hvd_adam.simulate import calibration
from hvd_adam.simulate.config import JobConfig, PredictConfig
from hvd_adam.simulate.forecast import Forecast, forecast
from hvd_adam.simulate.machine import NETWORKS, PRESETS, TCP_PAYLOAD, Link, Machine
from hvd_adam.simulate.step import Setting
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.simulate.workload import PUBLISHED, Workload, published
from hvd_adam.training.outputs import require_outputs


def predict(config: PredictConfig) -> None:
    """Writes the forecasts to stdout, and the files that were asked for.

    Raises:
        UserError: a launcher started several ranks, the calibration cannot be read or has no such model, or a file
            cannot be written.
    """
    require_no_launcher()
    require_outputs({"--plot": config.plot, "--html": config.html}, replace=config.force)
    files = {name: Path(path) for name, path in (("plot", config.plot), ("html", config.html)) if path}
    forecasts, notes = forecasts_of(config)
    if config.json:
        write_result(json.dumps({"rows": [asdict(row) for row in forecasts], "notes": notes}) + "\n")
    from hvd_adam.simulate import report  # here: matplotlib takes a second

    if not config.json:
        write_result(report.table(forecasts, notes))
    for name, path in files.items():
        content = report.png(forecasts) if name == "plot" else report.page(forecasts, notes).encode()
        with whole_file(f"--{name}", path) as draft:
            draft.write_bytes(content)


def forecasts_of(config: PredictConfig) -> tuple[list[Forecast], list[str]]:
    """Returns a forecast for each number of ranks, and notes on what they are based on."""
    workload, machine, per_host, notes = job_of(config)
    link = machine.between
    notes += [
        f"strategy {config.strategy}, compression {config.compression}, {config.accumulate} micro-batches of "
        f"{workload.samples} samples, {workload.elements / 1e6:.1f} M parameters, {per_host} ranks a host",
        f"between hosts {link.bandwidth * 8 / 1e9:.3g} Gbit/s of payload, {link.latency * 1e6:.3g} µs a message; "
        f"inside {machine.inside.bandwidth / 1e9:.3g} GB/s, {machine.inside.latency * 1e6:.3g} µs",
        "±: one standard error, from those of the inputs; memory is without activations; gains of a larger batch "
        "assume that a sample computes as fast",
    ]
    settings = [
        Setting(Ranks(n, min(n, per_host)), config.strategy, config.compression, config.accumulate)
        for n in config.numbers_of_ranks()
    ]
    return [forecast(workload, setting, machine, config.price) for setting in settings], notes


def job_of(config: JobConfig) -> tuple[Workload, Machine, int, list[str]]:
    """Returns the workload, the machine with the network that was given, its ranks per host, and notes.

    Raises:
        UserError: the calibration cannot be read or has no such model, or a network has no effect.
    """
    workload, machine, calibrated, notes = _inputs(config)
    per_host = config.ranks_per_host or calibrated
    if config.numbers_of_ranks()[-1] <= per_host:
        _require_no_network(config, per_host)
    elif config.network is None and config.bandwidth is None and any((machine.copies or {}).values()):
        # Copies have been measured: the ranks of the calibration were on one host.
        notes.append(
            "no network is given: hosts are taken to be joined as the ranks of one host were in the calibration; "
            "give --bandwidth or --network"
        )
    machine = _overridden(machine, config)
    if config.cores_per_host is not None:
        machine = replace(machine, cores=config.cores_per_host)
    return workload, machine, per_host, notes


def _require_no_network(config: JobConfig, per_host: int) -> None:
    most = config.numbers_of_ranks()[-1]
    for name in ("network", "bandwidth", "latency"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name} has no effect on {most} ranks of one host, which has {per_host}: "
                "give --ranks-per-host or more --ranks"
            )


def _inputs(config: JobConfig) -> tuple[Workload, Machine, int, list[str]]:
    if config.preset is not None:
        preset, name = PRESETS[config.preset], str(config.model)
        speed = config.throughput or PUBLISHED[name].throughput
        source = "as given" if config.throughput else PUBLISHED[name].source
        notes = [f"{name} at {speed:.1f} samples/s of a rank ({source})", f"{config.preset}: {preset.source}"]
        workload = published(name, config.batch_size, speed, config.bucket_mib * 2**20)
        return workload, preset.machine, preset.ranks_per_host, notes
    measured = calibration.read(str(config.calibration))
    name = config.model or next(iter(measured.workloads))
    if name not in measured.workloads:
        known = ", ".join(measured.workloads)
        raise UserError(f"--model {name} is not in {config.calibration}, which has {known}: calibrate it too")
    about = ", ".join(f"{key} {value}" for key, value in measured.description.items())
    varied = f"computing varied by {measured.machine.jitter:.0%} from pass to pass"
    notes = [f"{name}, measured: {about}; {varied}"]
    return measured.workloads[name], measured.machine, measured.ranks_per_host, notes


def _overridden(machine: Machine, config: JobConfig) -> Machine:
    """Returns a machine with another network between its hosts. What processors spend on a byte stays."""
    link = machine.between
    if config.network is not None:
        link = replace(NETWORKS[config.network], cpu=link.cpu)
    rate, latency = config.bits_per_second(), config.seconds_of_latency()
    known = dict(machine.uncertainty)
    if rate is not None:
        link = Link(rate / 8 * TCP_PAYLOAD, link.latency, link.cpu)
    if latency is not None:
        link = replace(link, latency=latency)
    return replace(machine, between=link, uncertainty=known)
