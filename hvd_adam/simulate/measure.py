"""`calibrate`: measures network, processors, optimizer and models on the ranks of a launcher."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.collectives.pieces import start_allgather, start_allreduce, start_alltoall
from hvd_adam.distributed.context import MESSAGE_BYTES, horovod, init
from hvd_adam.distributed.placement import cores, cpu_model
from hvd_adam.errors import UserError
from hvd_adam.log import logger, write_result
from hvd_adam.models import zoo
from hvd_adam.optim.adam import Adam
from hvd_adam.simulate.calibration import Calibration
from hvd_adam.simulate.codec_costs import codec_costs
from hvd_adam.simulate.config import CalibrateConfig
from hvd_adam.simulate.machine import UNDIVIDED, Link, Machine
from hvd_adam.simulate.profile import cores_of_machine, profile, timed
from hvd_adam.simulate.step import BUCKET_BYTES, UPDATE_BYTES
from hvd_adam.simulate.tcp import tcp_seconds
from hvd_adam.simulate.timeline import NOTICED
from hvd_adam.simulate.traffic import Ranks, Traffic, allgather, allreduce, alltoall
from hvd_adam.simulate.whole_steps import with_unexplained
from hvd_adam.training.outputs import require_outputs
from hvd_adam.versions import installed_version

UPDATE_ELEMENTS = 1 << 22
BUSY = 0.15  # deviation of a pass, of which idle machines have less
_SMALL, _IN_FLIGHT, _LARGE_IN_FLIGHT = 16, 8, 3


class Network(NamedTuple):
    """What has been measured of the network.

    Attributes:
        link: the link between the ranks.
        negotiation: seconds.
        slice: as in `Machine`.
        copies: as in `Machine`.
        error: relative, of the bandwidth.
    """

    link: Link
    negotiation: float
    slice: float
    copies: dict[str, float] | None
    error: float


def calibrate(config: CalibrateConfig) -> None:
    """Measures, and writes the file on rank 0. Every rank calls it.

    Raises:
        UserError: one rank only, an unknown model, or the file cannot be written; raised on every rank.
    """
    cluster = init(config.device)
    if cluster.size < 2:
        start = "horovodrun -np 2 python -m hvd_adam.simulate calibrate"
        raise UserError(f"calibrate needs at least 2 ranks: start it as in {start}")
    path = Path(config.output)
    with raise_on_all_ranks(cluster):
        if cluster.is_root:
            require_outputs({"--output": config.output}, replace=config.force)
    calibration = measure(cluster, config)
    with raise_on_all_ranks(cluster):
        if cluster.is_root:
            with whole_file("--output", path) as draft:
                draft.write_text(calibration.to_json(), encoding="utf-8")
            write_result(f"{path}: {', '.join(calibration.workloads)} on {cluster.size} ranks\n")
    if calibration.machine.jitter > BUSY:
        logger.warning(
            f"computing varied by {calibration.machine.jitter:.0%} from pass to pass: other programs use the "
            "cores. Calibrate again on an idle machine, or predictions are wrong"
        )


def measure(cluster: Cluster, config: CalibrateConfig) -> Calibration:
    """Returns the calibration; the same on all ranks, which all call it.

    Args:
        cluster: this process.
        config: what is measured, and how often.
    """
    workloads, deviations, errors = {}, [], []
    for name in config.model_names():
        logger.info(f"measuring {name}")
        measured = profile(cluster, _model(cluster, name, config), config)
        workloads[name] = measured.workload
        deviations.append(measured.deviation)
        errors.append(measured.error)
    logger.info("measuring network, codecs and optimizer")
    network = _network(cluster, config.repeats)
    machine = Machine(
        inside=network.link,
        between=network.link,
        cycle=_cycle(),
        negotiation=network.negotiation,
        update_bandwidth=_update_bandwidth(cluster, config.repeats),
        copy_bandwidth=_copy_bandwidth(cluster, config.repeats),
        copies=network.copies,
        collectives="openmpi" if horovod().mpi_enabled() and cluster.device.type == "cpu" else "ring",
        codecs=codec_costs(cluster, config.repeats),
        jitter=median(deviations),
        cores=None if cluster.device.type == "cuda" else _cores_of_host(cluster),
        threads=1 if cluster.device.type == "cuda" else torch.get_num_threads(),
        slice=network.slice,
        message_bytes=UNDIVIDED if cluster.device.type == "cuda" else MESSAGE_BYTES,
        uncertainty={
            "computing": median(errors),
            "bandwidth": network.error,
            "latency": network.error,
            "jitter": 0.5,
        },
    )
    for name, work in workloads.items():
        logger.info(f"measuring steps of {name}")
        model = _model(cluster, name, config)
        workloads[name] = with_unexplained(cluster, machine, model, work, config)
    return Calibration(machine, workloads, cluster.local_size, _description(cluster, config))


def _model(cluster: Cluster, name: str, config: CalibrateConfig) -> torch.nn.Module:
    with raise_on_all_ranks(cluster):
        return zoo.build(name, sample_shape=config.shape, num_classes=config.classes).to(cluster.device)


def _network(cluster: Cluster, repeats: int) -> Network:
    """Returns what the link between the ranks does, whether inside a host or between hosts.

    One small all-reduce takes the wait for Horovod's thread, a negotiation and its messages; each further one that
    is in flight takes its messages. Large ones take their bytes as well. Inside a host of processors their bytes
    take copies and additions only.
    """
    ranks = Ranks(cluster.size, cluster.local_size)
    of_cpus = cluster.device.type == "cpu"
    plain = Machine(Link(1, 0), Link(1, 0), message_bytes=MESSAGE_BYTES if of_cpus else UNDIVIDED)
    small = torch.zeros(_SMALL, device=cluster.device)
    one = _in_flight(cluster, start_allreduce, small, 1, repeats)
    several = _in_flight(cluster, start_allreduce, small, _IN_FLIGHT, repeats)
    messages = allreduce(4 * _SMALL, ranks, plain).messages
    latency = max(1e-7, (median(several) - median(one)) / (_IN_FLIGHT - 1) / messages)
    negotiation = max(1e-6, median(one) - latency * messages - _cycle() / 2)
    costs, errors = {}, []
    for kind, (start, traffic, values) in _collectives(cluster).items():
        moved = traffic(BUCKET_BYTES, ranks, plain)
        single = _in_flight(cluster, start, values, 1, repeats)
        times = _in_flight(cluster, start, values, _LARGE_IN_FLIGHT, repeats)
        each = (median(times) - median(single)) / (_LARGE_IN_FLIGHT - 1)
        costs[kind] = max(1e-12, each - moved.messages * latency) / moved.sent
        low, _, high = quantiles(times, n=4)
        errors.append((high - low) / median(times) / 2)
    inside = of_cpus and not ranks.several_hosts
    cpu = float(cluster.mean(tcp_seconds(repeats))) if of_cpus else 0.0
    copies = costs if inside else dict.fromkeys(costs, 0.0) if of_cpus else None
    slice_ = _slice(cluster, median(one), messages, repeats) if of_cpus else 0.0
    return Network(Link(1 / costs["allreduce"], latency, cpu), negotiation, slice_, copies, max(errors))


def _collectives(cluster: Cluster) -> dict[str, tuple[Callable[..., Any], Callable[..., Traffic], Tensor]]:
    """Returns what starts a collective, its traffic, and what it is started with for a bucket, by its kind."""
    values, n = torch.zeros(BUCKET_BYTES // 4, device=cluster.device), cluster.size
    part = BUCKET_BYTES // 4 // n
    return {
        "allreduce": (start_allreduce, allreduce, values),
        "alltoall": (start_alltoall, alltoall, values[: n * part].view(n, part)),
        "allgather": (start_allgather, allgather, values[:part]),
    }


def _in_flight(
    cluster: Cluster, start: Callable[..., Any], values: Tensor, count: int, repeats: int
) -> list[float]:
    """Returns the seconds of collectives that are in flight together, on the slowest rank."""
    tensors = [values.clone() for _ in range(count)]
    pauses, times = random.Random(0), []
    for repeat in range(repeats + 2):
        cluster.barrier()
        time.sleep(pauses.random() * 2 * _cycle())  # so that Horovod's thread is met at any moment of its cycle
        before = time.perf_counter()
        waits = [start(t, f"hvd_adam.simulate.{start.__name__}.{len(t)}.{i}") for i, t in enumerate(tensors)]
        for wait in waits:
            wait()
        if cluster.device.type == "cuda":
            torch.cuda.synchronize()
        if repeat > 1:
            times.append(time.perf_counter() - before)
    gathered = cluster.gather(torch.tensor(times, dtype=torch.float64))
    return [float(max(of_ranks)) for of_ranks in zip(*gathered, strict=True)]


def _update_bandwidth(cluster: Cluster, repeats: int) -> float:
    """Returns the bytes a second that Adam's update moves, while all ranks make one."""
    p = torch.nn.Parameter(torch.zeros(UPDATE_ELEMENTS, device=cluster.device))
    p.grad = torch.ones_like(p)
    optimizer = Adam([p])
    return UPDATE_BYTES * UPDATE_ELEMENTS / float(cluster.mean(timed(optimizer.step, cluster, repeats)))


def _copy_bandwidth(cluster: Cluster, repeats: int) -> float:
    """Returns the bytes a second that a copy of a tensor larger than caches moves, while all ranks make one."""
    source = torch.zeros(UPDATE_ELEMENTS, device=cluster.device)
    target = torch.zeros_like(source)
    return 8 * UPDATE_ELEMENTS / float(cluster.mean(timed(lambda: target.copy_(source), cluster, repeats)))


def _cycle() -> float:
    """Returns the seconds of Horovod's cycle; `init` sets the variable."""
    return float(os.environ.get("HOROVOD_CYCLE_TIME", "1")) / 1e3


def _slice(cluster: Cluster, idle: float, messages: float, repeats: int) -> float:
    """Returns the scheduler's slice in seconds: what a message waits for while a rank computes on the same core.

    Where ranks have more cores than they compute with, Linux' default (kernel/sched/fair.c,
    `sysctl_sched_base_slice`).

    Args:
        cluster: this process.
        idle: seconds of a small all-reduce of a rank that sleeps meanwhile.
        messages: of that all-reduce.
        repeats: of the measurement.
    """
    if _cores_of_host(cluster) >= cluster.local_size * (torch.get_num_threads() + 1):
        return 0.7e-3 * (1 + math.floor(math.log2(min(8, os.cpu_count() or 1))))
    hvd, matrix, times = horovod(), torch.zeros(64, 64), []
    for _ in range(4 * repeats):
        cluster.barrier()
        before = time.perf_counter()
        handle = hvd.allreduce_async(torch.zeros(_SMALL), name="hvd_adam.simulate.slice")
        while not hvd.poll(handle):
            matrix @ matrix
        times.append(time.perf_counter() - before)
        hvd.synchronize(handle)
    return max(0.0, float(cluster.mean(median(times))) - idle) / (NOTICED + messages)


def _cores_of_host(cluster: Cluster) -> float:
    """Returns the cores that the ranks of a host share: ranks of several "hosts" of one machine share them too."""
    of_ranks = cores_of_machine(cluster)
    return len(set().union(*of_ranks)) / len(of_ranks) * cluster.local_size


def _description(cluster: Cluster, config: CalibrateConfig) -> dict[str, str]:
    """Returns hardware and software, for a reader."""
    gpu = cluster.device.type == "cuda"
    names = {
        "device": torch.cuda.get_device_name(cluster.device) if gpu else cpu_model(),
        "cores": str(len(cores())),
        "threads of a rank": str(torch.get_num_threads()),
        "ranks": f"{cluster.size} on {cluster.cross_size} hosts, {cluster.launcher}",
        "batch size": str(config.batch_size),
        "images": f"{'×'.join(map(str, config.shape))}, {config.classes} classes",
        "torch": str(torch.__version__),
        "horovod": str(installed_version("horovod")),
        "date": time.strftime("%Y-%m-%d"),
    }
    return names
