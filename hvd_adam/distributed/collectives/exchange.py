"""`exchange`: the one collective beneath `Cluster`'s methods, which notices ranks that do different things."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.join import refuse_in_join
from hvd_adam.errors import CollectiveError

_NAME = "hvd_adam.cluster"  # the same for all methods, so that ranks that call different ones meet
_FAILED = -1


@dataclass(frozen=True)
class Call:
    """What a rank calls, and what must be identical on all ranks.

    Attributes:
        method: for messages, as in "cluster.mean()".
        kinds: type, shape and dtype of each value by its path.
        error: why this rank cannot take part with its value, or "".
    """

    method: str
    kinds: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    def checksum(self) -> int:
        """Returns a number that differs if the calls differ, or `_FAILED` with an error."""
        return _FAILED if self.error else zlib.crc32(repr((self.method, [*self.kinds.items()])).encode())


@torch.inference_mode(False)  # Horovod's thread is not in that mode
def exchange(cluster: Cluster, call: Call, words: Tensor) -> list[Tensor]:
    """Returns the words of all ranks. Every rank must call it, also with an error.

    Args:
        cluster: this process; of several ranks.
        call: must be the same on all ranks, or all raise an error.
        words: 1-dimensional int64 on the CPU, as many as this rank likes.

    Raises:
        CollectiveError: on every rank, if a rank has an error or the calls differ; names ranks and values.
    """
    refuse_in_join()
    header = torch.tensor([call.checksum(), len(words)], dtype=torch.int64, device="cpu")
    gathered = horovod().allgather(torch.cat([header, words]), name=_NAME)
    rows, checksums, start = [], [], 0
    while start < len(gathered):
        checksum, length = gathered[start : start + 2].tolist()
        checksums.append(checksum)
        rows.append(gathered[start + 2 : start + 2 + length])
        start += 2 + length
    if len(set(checksums)) > 1 or _FAILED in checksums:
        own = (call.method, dict(call.kinds), call.error, socket.gethostname())
        _raise_difference(horovod().allgather_object(own, name=f"{_NAME}.calls"))
    return rows


def _raise_difference(calls: list[tuple[str, dict[str, str], str, str]]) -> None:
    """Raises what is wrong with the calls of the ranks, the same on all of them."""
    method, kinds, _, _ = calls[0]
    for rank, (other, _, _, host) in enumerate(calls):
        if other != method:
            raise CollectiveError(
                f"the ranks call different methods: {method} on rank 0 and {other} on rank {rank} on {host}; "
                "every rank must make the same calls in the same order"
            )
    for rank, (_, _, error, host) in enumerate(calls):
        if error:
            raise CollectiveError(f"{method} on rank {rank} on {host}: {error}")
    for rank, (_, others, _, host) in enumerate(calls):
        for path in sorted({*kinds, *others}):
            here, there = kinds.get(path, "absent"), others.get(path, "absent")
            if here != there:
                raise CollectiveError(
                    f"{method}: {path} is {here} on rank 0 and {there} on rank {rank} on {host}; pass the same "
                    "keys, shapes and dtypes on every rank"
                )
    raise CollectiveError(f"{method}: the ranks pass different values")
