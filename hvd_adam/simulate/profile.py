"""The computing of a model: when the gradients of each bucket are ready, measured with hooks."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Layout
from hvd_adam.distributed.placement import cores
from hvd_adam.distributed.wire.codable import exact_parameters
from hvd_adam.simulate.config import CalibrateConfig
from hvd_adam.simulate.step import BUCKET_BYTES
from hvd_adam.simulate.workload import Bucket, Workload

WARM_UP = 3
NORMAL_QUARTILES = 1.349  # standard deviations between the quartiles of normal draws


class Profile(NamedTuple):
    """A measured workload, the relative deviation of a pass on a rank, and the relative error of its mean."""

    workload: Workload
    deviation: float
    error: float


def profile(cluster: Cluster, model: nn.Module, config: CalibrateConfig) -> Profile:
    """Returns what a model computes, while all ranks compute. Every rank calls it.

    Args:
        cluster: this process.
        model: on the device; every parameter gets a gradient.
        config: the images, and the number of passes.
    """
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    images, labels = random_batch(cluster, config)
    ready: dict[Tensor, float] = {}

    def note(p: Tensor) -> None:
        ready[p] = _clock(cluster)

    for p in params:
        p.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]
    passes: list[list[float]] = []
    layout = Layout.of(params, BUCKET_BYTES)

    def run() -> tuple[float, float, float]:
        """Makes a pass. Returns the times at its start, after forward, and at its end."""
        for p in params:
            p.grad = None  # as zero_grad: backward then writes to fresh memory
        start = _clock(cluster)
        loss = F.cross_entropy(model(images).float(), labels)
        middle = _clock(cluster)
        backward(loss)
        return start, middle, _clock(cluster)

    for number in range(WARM_UP + config.repeats):
        cluster.barrier()
        start, middle, end = run()
        of_buckets = [
            max(ready.get(p, middle) for p in params[b.first : b.last]) - middle for b in reversed(layout.buckets)
        ]
        if number >= WARM_UP:
            passes.append([middle - start, end - middle, *of_buckets])
    own = torch.tensor([median(column) for column in zip(*passes, strict=True)], dtype=torch.float64)
    forward, whole_backward, *times = cluster.mean(own).tolist()
    whole = [row[0] + row[1] for row in passes]
    low, middle_pass, high = quantiles(whole, n=4)
    deviation = float(cluster.mean((high - low) / NORMAL_QUARTILES / middle_pass))
    exact = exact_parameters(model)
    buckets, latest = [], 0.0
    for b, seconds in zip(reversed(layout.buckets), times, strict=True):
        latest = min(whole_backward, max(latest, seconds))
        members = params[b.first : b.last]
        left_out = sum(p.numel() for p in members if p.dim() < 2 or p in exact)
        buckets.append(Bucket(sum(p.numel() for p in members), left_out, latest))
    buckets[-1] = Bucket(buckets[-1].elements, buckets[-1].exact, whole_backward)  # sent when backward has ended
    sharing = _sharing(cluster, run, config.repeats)
    workload = Workload(config.batch_size, forward, whole_backward, tuple(buckets), sharing=sharing)
    return Profile(workload, deviation, deviation / len(passes) ** 0.5)


def cores_of_machine(cluster: Cluster) -> list[tuple[int, ...]]:
    """Returns the cores of each rank on this machine: ranks of several "hosts" of one machine share them.

    Every rank calls it.
    """
    of_machine = Path("/proc/sys/kernel/random/boot_id")
    own = of_machine.read_text() if of_machine.exists() else platform.node()
    placed = horovod().allgather_object((own, cores()))
    return [may_use for machine, may_use in placed if machine == own]


def _sharing(cluster: Cluster, run: Callable[[], object], repeats: int) -> float:
    """Returns the core-seconds of a pass while two ranks share each core, over those of a pass without.

    More than 1 where they displace each other's data from the core's caches. 1 on devices, and where the ranks at
    hand cannot share cores for a moment: one rank on a machine, more threads than cores, or no control over cores.
    """
    of_ranks = cores_of_machine(cluster)
    free, needed = sorted(set().union(*of_ranks)), len(of_ranks) * torch.get_num_threads()
    can = hasattr(os, "sched_setaffinity") and cluster.device.type == "cpu"
    can = can and len(of_ranks) > 1 and len(free) >= needed and needed % 2 == 0
    if cluster.sum(int(not can)):
        return 1.0
    times: list[float] = []
    for _ in range(1 + repeats // 2):
        for shared in (False, True):
            with _threads_on(free[: needed // 2]) if shared else nullcontext():
                for _ in range(2):  # the first pass fills the caches of the cores
                    cluster.barrier()
                    seconds = seconds_of(run, cluster)
            times.append(seconds)
    of_slowest = torch.stack(cluster.gather(torch.tensor(times, dtype=torch.float64))).amax(0).view(-1, 2)
    alone, both = of_slowest.unbind(1)
    return max(1.0, float((both / 2 / alone).median()))


@contextmanager
def _threads_on(allowed: list[int]) -> Iterator[None]:
    """Moves all threads of this process to some cores."""
    tasks, own, before = Path("/proc/self/task"), os.sched_getaffinity(0), {}
    for task in tasks.iterdir():
        thread = int(task.name)
        with suppress(ProcessLookupError):  # it has ended
            before[thread] = os.sched_getaffinity(thread)
            os.sched_setaffinity(thread, allowed)
    try:
        yield
    finally:
        for task in tasks.iterdir():  # with threads that have begun meanwhile
            with suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), before.get(int(task.name), own))


def random_batch(cluster: Cluster, config: CalibrateConfig) -> tuple[Tensor, Tensor]:
    """Returns images and labels on the device, other ones on each rank."""
    generator = torch.Generator().manual_seed(cluster.rank)
    images = torch.randn(config.batch_size, *config.shape, generator=generator).to(cluster.device)
    return images, torch.randint(config.classes, (config.batch_size,), generator=generator).to(cluster.device)


def backward(loss: Any) -> None:
    """Runs a backward pass. torch's stubs have no types for it."""
    loss.backward()


def timed(call: Callable[[], object], cluster: Cluster, repeats: int) -> float:
    """Returns the median seconds of a call on this rank, after some that are not counted."""
    times = []
    for _ in range(WARM_UP + repeats):
        times.append(seconds_of(call, cluster))
    return median(times[WARM_UP:])


def seconds_of(call: Callable[[], object], cluster: Cluster) -> float:
    """Returns the seconds of one call on this rank."""
    before = _clock(cluster)
    call()
    return _clock(cluster) - before


def _clock(cluster: Cluster) -> float:
    if cluster.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
