"""What each rank gets of its host: a GPU, a number of threads and when they run, and memory that it keeps."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_adam.errors import CollectiveError

if TYPE_CHECKING:
    import torch


# Parameters of mallopt (malloc.h), and the environment by which a user sets what they do.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_OF_MALLOC = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


@dataclass(frozen=True)
class RankPlacement:
    """Host, cores and GPUs of a rank.

    Attributes:
        host: host name.
        cores: indices of the cores that the rank may run on, ascending.
        gpus: an identity for each GPU that the rank sees, in the rank's order. Ranks of one host have equal
            identities for the same GPU.
    """

    host: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @classmethod
    def of_this_rank(cls, device: str) -> RankPlacement:
        """Returns the placement of this process, without GPUs if `device` is "cpu"."""
        return cls(socket.gethostname(), cores(), visible_gpus() if device != "cpu" else ())


def cpu_model() -> str:
    """Returns the name of the processor; that of its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def cores() -> tuple[int, ...]:
    """Returns the cores that this process may run on, ascending; all cores on systems without CPU affinity."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def visible_gpus() -> tuple[str, ...]:
    """Returns an identity for each GPU that this process sees, its UUID where PyTorch knows it."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(str(getattr(item, "uuid", f"{index} of {visible}")) for index, item in enumerate(properties))


def computes_on_cpus(device: str) -> bool:
    """Returns whether this process sees no GPU, or is to use none; without initializing CUDA.

    Args:
        device: as in `init`.
    """
    import torch

    return device == "cpu" or torch.cuda.device_count() == 0


def assign_gpus(placements: Sequence[RankPlacement], device: str) -> list[int | None]:
    """Assigns each rank a GPU that no other rank uses, among those that the launcher lets it see.

    A maximum bipartite matching of ranks and GPUs, by augmenting paths (Kuhn 1955).

    Args:
        placements: of all ranks, by rank.
        device: as in `init`.

    Returns:
        For each rank an index into its `gpus`; None for every rank if they compute on CPUs.

    Raises:
        CollectiveError: a host has fewer GPUs than ranks, or a rank sees no GPU although `device` is "cuda" or
            another rank sees one.
    """
    if device != "cuda" and not any(placement.gpus for placement in placements):
        return [None] * len(placements)
    owners: dict[tuple[str, str], int] = {}

    def take(rank: int, visited: set[tuple[str, str]]) -> bool:
        own = [(placements[rank].host, gpu) for gpu in placements[rank].gpus]
        for gpu in [*(gpu for gpu in own if gpu not in owners), *own]:  # prefer a GPU that no rank has
            if gpu not in visited:
                visited.add(gpu)
                if gpu not in owners or take(owners[gpu], visited):
                    owners[gpu] = rank
                    return True
        return False

    for rank, placement in enumerate(placements):
        if not placement.gpus:
            raise CollectiveError(
                f"rank {rank} on {placement.host} sees no GPU; check its driver and CUDA_VISIBLE_DEVICES, "
                "or train on --device cpu"
            )
        if not take(rank, set()):
            there = [other for other in placements if other.host == placement.host]
            gpus = len({gpu for other in there for gpu in other.gpus})
            raise CollectiveError(
                f"{len(there)} ranks on {placement.host} for {gpus} GPU{'s' * (gpus > 1)}; start one rank per GPU "
                "(-np, -H host:slots, --ntasks-per-node), or train on --device cpu"
            )
    taken = {rank: gpu for (_, gpu), rank in owners.items()}
    return [placement.gpus.index(taken[rank]) for rank, placement in enumerate(placements)]


def describe_oversubscription(placements: Sequence[RankPlacement]) -> str:
    """Returns a warning about the first host that has more ranks than cores; empty if there is none.

    Args:
        placements: of all ranks.
    """
    for host in dict.fromkeys(placement.host for placement in placements):
        there = [placement for placement in placements if placement.host == host]
        available = len({core for placement in there for core in placement.cores})
        if len(there) > available:
            return (
                f"{len(there)} ranks on {host} share {available} core{'s' * (available > 1)} and wait for each "
                "other; start fewer ranks there (-np, -H host:slots, --ntasks-per-node), or use more cores"
            )
    return ""


def share_cores(own: RankPlacement, placements: Sequence[RankPlacement]) -> None:
    """Sets PyTorch's number of threads to this rank's share of its cores, unless OMP_NUM_THREADS is set.

    PyTorch's default is a thread per core in every rank.

    Args:
        own: this rank's placement.
        placements: of all ranks.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    sharing = sum(other.host == own.host and other.cores == own.cores for other in placements)
    torch.set_num_threads(max(1, len(own.cores) // sharing))


@contextmanager
def batch_policy() -> Iterator[None]:
    """Gives this thread the policy SCHED_BATCH within this block, and threads that it starts there for good.

    Such a thread has the same share of a core, but does not interrupt another one when it wakes up.

    Nothing changes on systems without this policy or that forbid it, as a container may, or if the user has chosen
    another one.

    Source: sched(7).
    """
    changes = hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER
    if changes:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        except OSError:
            changes = False
    try:
        yield
    finally:
        if changes:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def use_device(gpu: int | None) -> torch.device:
    """Makes the GPU with this index the current one and returns its device; returns the CPU for None."""
    import torch

    if gpu is None:
        return torch.device("cpu")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def keep_freed_memory() -> None:
    """Makes glibc keep memory that is freed, for the next step, unless the environment sets what malloc does.

    By default glibc returns large blocks to the kernel, which clears every page when they are allocated again. A
    step of the cnn with 16 images takes 17.7 ms on one core in place of 22.5, with 128 images 123 in place of 157.
    The process keeps the most that it has used. Without glibc nothing changes.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name in os.environ for name in _OF_MALLOC):
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that older releases accept
