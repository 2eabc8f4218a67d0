"""Which GPU each rank uses, and how many cores: decided from where all ranks run."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hvd_adam.errors import CollectiveError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RankPlacement:
    """Where a rank runs, for the others on its host to compare with.

    Attributes:
        host: its name.
        cores: those that this rank may run on.
        gpus: those that it sees, in its order; equal on ranks of a host that mean the same one.
    """

    host: str
    cores: tuple[int, ...]
    gpus: tuple[str, ...]

    @classmethod
    def of_this_rank(cls, device: str) -> RankPlacement:
        """This process's; with device "cpu" it sees no GPU."""
        return cls(socket.gethostname(), cores(), visible_gpus() if device != "cpu" else ())


def cores() -> tuple[int, ...]:
    """The cores that this process may run on, ascending; where the system does not tell, all of the host."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def visible_gpus() -> tuple[str, ...]:
    """An identity for each GPU that this process sees."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(str(getattr(item, "uuid", f"{index} of {visible}")) for index, item in enumerate(properties))


def assign_gpus(places: Sequence[RankPlacement], device: str) -> list[int | None]:
    """Which of the GPUs that it sees each rank takes: one of its own, whatever the launcher has bound ranks to.

    Args:
        places: of all ranks, in order.
        device: as in `init`.

    Returns:
        For each rank an index into its `gpus`; None for all where no rank sees any.

    Raises:
        CollectiveError: there are not enough, or a rank sees none though it should.
    """
    if device != "cuda" and not any(place.gpus for place in places):
        return [None] * len(places)
    owners: dict[tuple[str, str], int] = {}

    def take(rank: int, asked: set[tuple[str, str]]) -> bool:
        own = [(places[rank].host, gpu) for gpu in places[rank].gpus]
        for gpu in [*(gpu for gpu in own if gpu not in owners), *own]:  # only then one whose owner sees another
            if gpu not in asked:
                asked.add(gpu)
                if gpu not in owners or take(owners[gpu], asked):
                    owners[gpu] = rank
                    return True
        return False

    for rank, place in enumerate(places):
        if not place.gpus:
            raise CollectiveError(
                f"rank {rank} on {place.host} sees no GPU; check its driver and CUDA_VISIBLE_DEVICES, "
                "or train on --device cpu"
            )
        if not take(rank, set()):
            there = [other for other in places if other.host == place.host]
            gpus = len({gpu for other in there for gpu in other.gpus})
            raise CollectiveError(
                f"{len(there)} ranks on {place.host} for {gpus} GPU{'s' * (gpus > 1)}; start one rank a GPU "
                "(-np, -H host:slots, --ntasks-per-node), or train on --device cpu"
            )
    taken = {rank: gpu for (_, gpu), rank in owners.items()}
    return [place.gpus.index(taken[rank]) for rank, place in enumerate(places)]


def share_cores(here: RankPlacement, places: Sequence[RankPlacement]) -> None:
    """Divides the cores among the ranks that may run on them; PyTorch alone gives every rank all."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return
    sharers = sum(other.host == here.host and other.cores == here.cores for other in places)
    torch.set_num_threads(max(1, len(here.cores) // sharers))


def use_device(gpu: int | None) -> torch.device:
    """Makes the GPU of this index the current one and returns its device; the CPU for None."""
    import torch

    if gpu is None:
        return torch.device("cpu")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)
