"""What a job of each size does: speed, cost, what limits it, what would help, and how sure that is. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import Link, Machine
from hvd_adam.simulate.step import ADVISED, CODED, STRATEGIES, Setting, Step, simulate
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.simulate.workload import Workload

LEAST_GAIN = 0.02  # less is not worth a change

BOTTLENECKS = {
    "computing": "computing",
    "coding": "encoding and decoding of gradients",
    "bandwidth": "bandwidth of the network",
    "latency": "latency of the network",
    "update": "the optimizer's update",
    "stragglers": "waiting for the slowest rank",
    "overhead": "costs of measured steps that the model does not explain",
}


@dataclass(frozen=True)
class Forecast:
    """The forecast for one number of ranks.

    Attributes:
        ranks: number of ranks.
        step: the predicted step.
        error: standard error of its seconds.
        throughput: samples a second.
        efficiency: throughput over that of so many ranks that train alone.
        memory: bytes of a rank, without activations.
        price: of a million samples; None without a price.
        bottleneck: the largest part of the step that one rank alone would not have; "computing" if all are small.
        advice: what would make a sample faster, with its relative gain in throughput, the best first.
    """

    ranks: int
    step: Step
    error: float
    throughput: float
    efficiency: float
    memory: float
    price: float | None
    bottleneck: str
    advice: Sequence[tuple[str, float]]


def forecast(workload: Workload, setting: Setting, machine: Machine, price: float | None = None) -> Forecast:
    """Returns the forecast of a job.

    Args:
        workload: of one micro-batch.
        setting: how the job is run.
        machine: on which machines.
        price: of a rank and hour, or None.

    Raises:
        UserError: the step would take no time: measured ones took so much less than simulated ones.
    """
    step = simulate(workload, setting, machine)
    total = setting.ranks.total
    if step.seconds <= 0:
        raise UserError(
            f"--calibration: a step of {total:,} rank(s) would take {step.seconds * 1e3:.3g} ms, since measured "
            "steps took less than simulated ones: calibrate on such ranks and such a network"
        )
    speed = _throughput(workload, setting, step)
    alone_setting = replace(setting, ranks=Ranks(1, 1))
    alone = simulate(workload, alone_setting, machine)
    efficiency = speed / total / _throughput(workload, alone_setting, alone)
    lost = {name: step.parts[name] - alone.parts[name] for name in step.parts}
    worst = max(lost, key=lambda name: lost[name])
    if lost[worst] < LEAST_GAIN * step.seconds:
        worst = "computing"
    return Forecast(
        total,
        step,
        _error(workload, setting, machine, step.seconds),
        speed,
        efficiency,
        memory(workload, setting),
        None if price is None else price * total / 3600 / speed * 1e6,
        BOTTLENECKS[worst],
        _advice(workload, setting, machine, speed),
    )


def _throughput(workload: Workload, setting: Setting, step: Step) -> float:
    return setting.ranks.total * setting.accumulate * workload.samples / step.seconds


def _error(workload: Workload, setting: Setting, machine: Machine, expected: float) -> float:
    """Returns the standard error of a step: independent errors of the inputs, each of first order."""
    known = machine.uncertainty

    def links(change: Callable[[Link], Link]) -> Machine:
        return replace(machine, inside=change(machine.inside), between=change(machine.between))

    def slower(link: Link) -> Link:
        return replace(link, bandwidth=link.bandwidth / bandwidth, cpu=link.cpu * bandwidth)

    bandwidth, latency = 1 + known.get("bandwidth", 0.0), 1 + known.get("latency", 0.0)
    changed = [
        (workload.slower(1 + known.get("computing", 0.0)), machine),
        (workload, links(slower)),
        (workload, links(lambda link: replace(link, latency=link.latency * latency))),
        (workload, replace(machine, jitter=machine.jitter * (1 + known.get("jitter", 0.0)))),
    ]
    return math.hypot(*(simulate(work, setting, other).seconds - expected for work, other in changed))


def _advice(workload: Workload, setting: Setting, machine: Machine, speed: float) -> list[tuple[str, float]]:
    """Returns the changes that help, by their gains. A larger batch is assumed to compute as fast per sample."""
    gains = []
    for name, work, other, on in _changes(workload, setting, machine):
        gain = _throughput(work, other, simulate(work, other, on)) / speed - 1
        if gain >= LEAST_GAIN:
            gains.append((name, gain))
    return sorted(gains, key=lambda item: -item[1])


def _changes(
    workload: Workload, setting: Setting, machine: Machine
) -> Iterator[tuple[str, Workload, Setting, Machine]]:
    """Yields what could be changed: its name, and the job with the change."""
    yield "twice the batch size", workload.slower(2.0, samples=2.0), setting, machine
    more = replace(setting, accumulate=4 * setting.accumulate)
    yield f"--accumulate {more.accumulate}", workload, more, machine
    for name in ADVISED:
        if name != setting.compression:
            yield f"--compression {name}", workload, replace(setting, compression=name), machine
    for name in STRATEGIES:
        if name != setting.strategy:
            yield f"--strategy {name}", workload, replace(setting, strategy=name), machine
    yield "a network of twice the bandwidth", workload, setting, _with_network(machine, setting, 2.0, 1.0)
    yield "a network of half the latency", workload, setting, _with_network(machine, setting, 1.0, 0.5)


def _with_network(machine: Machine, setting: Setting, bandwidth: float, latency: float) -> Machine:
    """Returns a machine whose slowest links have another bandwidth and latency, by these factors."""

    def change(link: Link) -> Link:
        return replace(link, bandwidth=bandwidth * link.bandwidth, latency=latency * link.latency)

    if setting.ranks.several_hosts:
        return replace(machine, between=change(machine.between))
    return replace(machine, inside=change(machine.inside))


def memory(workload: Workload, setting: Setting) -> float:
    """Returns the bytes of parameters, gradients, optimizer state and residuals of a rank, without activations.

    Parameters and gradients have 4 bytes each, Adam's two moments 8, which are divided by the number of ranks if
    sharded (ZeRO stage 1, arXiv 1910.02054). Codes have two residuals of 8 bytes each, one of them divided by the
    number of ranks, or absent if sharded, and with it a float32 copy of the own shard (wire.coded_bucket).
    """
    n, sharded = setting.ranks.total, setting.strategy == "sharded" and setting.ranks.total > 1
    each = 8.0 + 8 / (n if sharded else 1)
    if setting.compression in CODED and n > 1:
        each += 8 + (4 / n if sharded else 8 / n)
    return each * workload.elements
