"""`RankGroup`: some of the ranks, which exchange among themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvd_adam.distributed.context import horovod


@dataclass(frozen=True)
class RankGroup:
    """Ranks that call collectives together, while others call other ones or none.

    Attributes:
        process_set: Horovod's.
        ranks: the ranks, ascending.
        on_own_hosts: whether each of them is known to be on another host. Identical on all of them.
    """

    process_set: Any
    ranks: Sequence[int]
    on_own_hosts: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def index(self) -> int:
        """Position of this process, which is one of them."""
        return self.ranks.index(horovod().rank())


def all_ranks() -> RankGroup:
    """Returns the group of all ranks of the job."""
    hvd = horovod()
    return RankGroup(hvd.global_process_set, range(hvd.size()), on_own_hosts=hvd.size() == hvd.cross_size())


def gather_plain(value: Any, group: RankGroup, name: str) -> list[Any]:
    """Returns the values of all ranks of a group, in their order. Every rank of it must call it.

    Args:
        value: numbers and texts, in lists and in dictionaries with texts as keys; tuples become lists.
        group: the ranks.
        name: prefix of the names of the collectives, identical on these ranks.
    """
    hvd = horovod()
    own = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8, device="cpu")
    size = torch.tensor([len(own)], device="cpu")
    sizes = hvd.allgather(size, name=f"{name}.sizes", process_set=group.process_set).tolist()
    texts = torch.split(hvd.allgather(own, name=f"{name}.values", process_set=group.process_set), sizes)
    return [json.loads(bytes(text.tolist())) for text in texts]
