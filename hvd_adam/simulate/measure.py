"""`calibrate`: measures network, processors, optimizer and models on the ranks of a launcher."""

from __future__ import annotations

import os
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

from hvd_adam.checkpoint.output import require_free, whole_file
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.collectives.pieces import start_allreduce
from hvd_adam.distributed.context import MESSAGE_BYTES, horovod, init
from hvd_adam.distributed.placement import cores
from hvd_adam.errors import UserError
from hvd_adam.log import logger, write_result
from hvd_adam.models import zoo
from hvd_adam.optim.adam import Adam
from hvd_adam.simulate.calibration import Calibration
from hvd_adam.simulate.codec_costs import codec_costs
from hvd_adam.simulate.config import CalibrateConfig
from hvd_adam.simulate.machine import UNDIVIDED, Link, Machine
from hvd_adam.simulate.profile import CLASSES, backward, profile, random_batch, timed
from hvd_adam.simulate.step import BUCKET_BYTES, UPDATE_BYTES, Setting, simulate
from hvd_adam.simulate.traffic import Ranks, allreduce
from hvd_adam.simulate.workload import Bucket, Workload
from hvd_adam.versions import installed_version

UPDATE_ELEMENTS = 1 << 22
_SMALL, _IN_FLIGHT = 16, 8


class Network(NamedTuple):
    """What has been measured of the network: the link, seconds of a negotiation, and the link's relative error."""

    link: Link
    negotiation: float
    error: float


def calibrate(config: CalibrateConfig) -> None:
    """Measures, and writes the file on rank 0. Every rank calls it.

    Raises:
        UserError: one rank only, an unknown model, or the file cannot be written; raised on every rank.
    """
    cluster = init(config.device)
    if cluster.size < 2:
        raise UserError("calibrate needs at least 2 ranks: start it as in horovodrun -np 2 python -m …")
    path = Path(config.output)
    with raise_on_all_ranks(cluster):
        if cluster.is_root:
            require_free("--output", path, replace=config.force)
    calibration = measure(cluster, config)
    with raise_on_all_ranks(cluster):
        if cluster.is_root:
            with whole_file("--output", path) as draft:
                draft.write_text(calibration.to_json(), encoding="utf-8")
            write_result(f"{path}: {', '.join(calibration.workloads)} on {cluster.size} ranks\n")


def measure(cluster: Cluster, config: CalibrateConfig) -> Calibration:
    """Returns the calibration; the same on all ranks, which all call it.

    Args:
        cluster: this process.
        config: what is measured, and how often.
    """
    workloads, deviations, errors = {}, [], []
    for name in config.model_names():
        with raise_on_all_ranks(cluster):
            shape = (3, config.image_size, config.image_size)
            model = zoo.build(name, sample_shape=shape, num_classes=CLASSES).to(cluster.device)
        logger.info(f"measuring {name}")
        measured = profile(cluster, model, config.batch_size, config.image_size, config.repeats)
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
        codecs=codec_costs(cluster, config.repeats),
        jitter=median(deviations),
        cores=None if cluster.device.type == "cuda" else _cores_of_host(cluster),
        threads=1 if cluster.device.type == "cuda" else torch.get_num_threads(),
        message_bytes=UNDIVIDED if cluster.device.type == "cuda" else MESSAGE_BYTES,
        uncertainty={
            "computing": median(errors),
            "bandwidth": network.error,
            "latency": network.error,
            "jitter": 0.5,
        },
    )
    machine = _with_overhead(cluster, machine, config.repeats)
    return Calibration(machine, workloads, cluster.local_size, _description(cluster, config))


def _network(cluster: Cluster, repeats: int) -> Network:
    """Returns what the link between the ranks does, whether inside a host or between hosts.

    One small all-reduce takes the wait for Horovod's thread, a negotiation and its messages; each further one that
    is in flight takes its messages. Large ones in flight take their bytes as well.
    """
    ranks = Ranks(cluster.size, cluster.local_size)
    one = _allreduces(cluster, _SMALL, 1, repeats)
    several = _allreduces(cluster, _SMALL, _IN_FLIGHT, repeats)
    plain = Machine(Link(1, 0), Link(1, 0), message_bytes=MESSAGE_BYTES)
    messages = allreduce(4 * _SMALL, ranks, plain).messages
    latency = max(1e-7, (median(several) - median(one)) / (_IN_FLIGHT - 1) / messages)
    negotiation = max(1e-6, median(one) - latency * messages - _cycle() / 2)
    large, count = BUCKET_BYTES // 4, 4
    cpu_before = time.process_time()
    times = _allreduces(cluster, large, count, repeats)
    spent = (time.process_time() - cpu_before) / (repeats + 1) / count
    single = _allreduces(cluster, large, 1, repeats)
    each = (median(times) - median(single)) / (count - 1)
    sent = allreduce(4 * large, ranks, plain).sent
    bandwidth = sent / max(1e-9, each - messages * latency)
    low, _, high = quantiles(times, n=4)
    cpu = cluster.mean(spent) / sent if cluster.device.type == "cpu" else 0.0
    link = Link(bandwidth, latency, min(cpu, 1 / bandwidth))
    return Network(link, negotiation, (high - low) / median(times) / 2)


def _allreduces(cluster: Cluster, elements: int, in_flight: int, repeats: int) -> list[float]:
    """Returns the seconds of all-reduces that are in flight together, on the slowest rank."""
    tensors = [torch.zeros(elements, device=cluster.device) for _ in range(in_flight)]
    pauses, times = random.Random(0), []
    for repeat in range(repeats + 1):
        cluster.barrier()
        time.sleep(pauses.random() * 2 * _cycle())  # so that Horovod's thread is met at any moment of its cycle
        before = time.perf_counter()
        waits = [start_allreduce(t, f"hvd_adam.simulate.{elements}.{i}") for i, t in enumerate(tensors)]
        for wait in waits:
            wait()
        if cluster.device.type == "cuda":
            torch.cuda.synchronize()
        if repeat:
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
    """Returns the bytes a second that a pass over a bucket moves, while all ranks make one."""
    values = torch.zeros(BUCKET_BYTES // 4, device=cluster.device)
    return 2 * BUCKET_BYTES / float(cluster.mean(timed(lambda: values.mul_(0.5), cluster, repeats)))


def _with_overhead(cluster: Cluster, machine: Machine, repeats: int) -> Machine:
    """Returns the machine with the costs of a step that its other figures do not explain.

    They are those of a step with a tiny model.
    """
    model = torch.nn.Linear(8, CLASSES).to(cluster.device)
    optimizer = distribute(Adam(model.parameters(), lr=1e-6), model)
    x, y = random_batch(cluster, 8, (8,))

    def compute() -> None:
        backward(torch.nn.functional.cross_entropy(model(x), y))

    def step() -> None:
        optimizer.zero_grad()
        compute()
        optimizer.step()

    plain = torch.nn.Linear(8, CLASSES).to(cluster.device)

    def alone() -> None:
        backward(torch.nn.functional.cross_entropy(plain(x), y))

    whole = float(cluster.mean(timed(step, cluster, 4 * repeats)))
    computing = float(cluster.mean(timed(alone, cluster, 4 * repeats)))
    bucket = Bucket(sum(p.numel() for p in model.parameters()), CLASSES, computing)
    tiny = Workload(8, 0.0, computing, (bucket,))
    explained = simulate(tiny, Setting(Ranks(cluster.size, cluster.local_size)), replace(machine, jitter=0.0))
    return replace(machine, overhead=max(0.0, whole - explained.seconds))


def _cycle() -> float:
    """Returns the seconds of Horovod's cycle; `init` sets the variable."""
    return float(os.environ.get("HOROVOD_CYCLE_TIME", "1")) / 1e3


def _cores_of_host(cluster: Cluster) -> float:
    """Returns the cores that the ranks of a host share: ranks of several "hosts" of one machine share them too."""
    of_machine = Path("/proc/sys/kernel/random/boot_id")
    machines = horovod().allgather_object(of_machine.read_text() if of_machine.exists() else platform.node())
    share = len(cores()) / int(machines.count(machines[cluster.rank]))
    return share * cluster.local_size


def _description(cluster: Cluster, config: CalibrateConfig) -> dict[str, str]:
    """Returns hardware and software, for a reader."""
    gpu = cluster.device.type == "cuda"
    names = {
        "device": torch.cuda.get_device_name(cluster.device) if gpu else _cpu_name(),
        "cores": str(len(cores())),
        "threads of a rank": str(torch.get_num_threads()),
        "ranks": f"{cluster.size} on {cluster.cross_size} hosts, {cluster.launcher}",
        "batch size": str(config.batch_size),
        "torch": str(torch.__version__),
        "horovod": str(installed_version("horovod")),
        "date": time.strftime("%Y-%m-%d"),
    }
    return names


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
