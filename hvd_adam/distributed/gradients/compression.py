"""Reductions of gradients, compressed or in formats that Horovod's collectives cannot reduce.

Horovod does not support bfloat16, and adds float16 in float16, where a sum over ranks overflows although the mean
does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch

from hvd_adam.distributed.collectives.pieces import (
    columns,
    start_allgather,
    start_allreduce,
    start_alltoall,
    start_reducescatter,
)
from hvd_adam.distributed.collectives.started import Chain, Sent, Stages, Started
from hvd_adam.distributed.context import horovod

COMPRESSIONS = ("none", "fp16", "bf16", "int8", "int4")
_HALF = (torch.float16, torch.bfloat16)


class Reduction(Stages, Protocol):
    """The reduction of one contiguous bucket over the ranks, started by its constructor.

    The second of two phases begins in `advance` or in `wait`: whoever waits for one reduction should
    also advance those that come after it.
    """

    def wait(self) -> None:
        """Waits until the bucket holds the result."""


@dataclass(frozen=True)
class Scaling:
    """A factor for the first elements of a bucket, applied in float32.

    Attributes:
        factor: 1 if the gradients have been multiplied already.
        elements: number of elements; the rest are flags.
    """

    factor: float = 1.0
    elements: int = 0

    def apply(self, values: torch.Tensor, start: int = 0) -> None:
        """Multiplies float32 values, which are those of the bucket from index `start` on."""
        if self.factor != 1.0:
            values[: max(0, self.elements - start)].mul_(self.factor)


def is_half(dtype: torch.dtype) -> bool:
    """Returns whether gradients of this dtype are reduced, and scaled, in float32."""
    return dtype in _HALF


def start_reduction(
    bucket: torch.Tensor, name: str, compression: str, scatter: bool = False, scaling: Scaling | None = None
) -> Reduction:
    """Starts to add a bucket of gradients over all ranks, in place.

    Args:
        bucket: contiguous and 1-dimensional; must be neither read nor changed until `wait` has returned.
        name: name of the collectives, identical on all ranks and unique among reductions in flight.
        compression: "none", "fp16" or "bf16".
        scatter: put the result into this rank's shard of the bucket only, the rank-th of N equal parts, with half
            the traffic. The length of the bucket must be a multiple of N.
        scaling: a factor for half-precision gradients, which they are too coarse for.
    """
    if compression == "bf16":
        return Bf16AllReduce(bucket, name, scatter, scaling)
    return AllReduce(bucket, name, compression, scatter, scaling)


class AllReduce:
    """The sum over the ranks, in place where the dtype allows.

    "none": float32 and float64 are reduced as they are, half-precision gradients as float32, so that the sum is
    not rounded. "fp16": all gradients are reduced as float16 (6e-8 to 65504).

    Attributes:
        in_place: whether the bucket itself is reduced, and whole.
    """

    def __init__(
        self,
        bucket: torch.Tensor,
        name: str,
        compression: str,
        scatter: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        self._bucket, self._scatter = bucket, scatter
        wire = bucket.float() if is_half(bucket.dtype) else bucket
        (scaling or Scaling()).apply(wire)  # before the sum, which might overflow
        if compression == "fp16":
            wire = wire.half()
        self.in_place = wire is bucket and not scatter
        self._started: Started[torch.Tensor]
        if scatter:
            self._started = start_reducescatter(wire.view(horovod().size(), -1), name)
        else:
            self._started = start_allreduce(wire, name).then(lambda _: wire)

    def advance(self) -> bool:
        """Does nothing: the reduction has one phase."""
        return False

    @property
    def has_arrived(self) -> bool:
        """Whether the sum is there."""
        return self._started.has_arrived

    def arrive(self) -> Iterator[int]:
        """Waits for a sum in place, message after message; yields how many elements have arrived."""
        return accumulate(len(piece) for (piece,) in self._started.each())

    def wait(self) -> None:
        """Waits for the sum."""
        total = self._started()
        if self._scatter:
            _own_shard(self._bucket).copy_(total)
        elif total is not self._bucket:
            self._bucket.copy_(total)


class Bf16AllReduce:
    """The sum over the ranks, sent as bfloat16 and added in float32.

    Every rank sends the r-th part of its bucket to rank r, which adds the parts in rank order and sends the sum to
    all ranks: 2·(N−1)/N·n elements of 2 bytes per rank, as many as a ring all-reduce. Each gradient is rounded
    once before it is sent, and the sum once (relative error ≤ 2⁻⁸ each). The range is float32's. Elements are
    sent as bytes, which every transport of Horovod supports.
    """

    def __init__(
        self, bucket: torch.Tensor, name: str, scatter: bool = False, scaling: Scaling | None = None
    ) -> None:
        self._bucket, self._scaling = bucket, scaling or Scaling()
        self._ranks = horovod().size()
        self._part = -(-bucket.numel() // self._ranks)
        self._sent = Sent[torch.Tensor]()
        for number, (start, end) in enumerate(columns(self._part, self._ranks, bucket.device)):
            summands = self._send(start, end, f"{name}.parts.{number}")
            total = summands.then(partial(self._add, start))
            if scatter:
                self._sent.add(total, partial(self._put_own, start))
            else:
                gather = partial(_start_gather, f"{name}.sum.{number}")
                self._sent.add(Chain(total, gather), partial(self._put_all, start))

    def _send(self, start: int, end: int, name: str) -> Started[torch.Tensor]:
        """Sends elements [start, end) of every part."""
        rows = torch.zeros(self._ranks, end - start, dtype=torch.bfloat16, device=self._bucket.device)
        for rank, row in enumerate(rows):
            own = self._elements(rank, start, end)
            row[: len(own)] = own
        return start_alltoall(rows.view(torch.uint8), name)

    def _elements(self, rank: int, start: int, end: int) -> torch.Tensor:
        """Returns elements of a part, which ends with the bucket."""
        return self._bucket[rank * self._part + start : rank * self._part + end]

    def _add(self, start: int, received: torch.Tensor) -> torch.Tensor:
        rows = received.view(torch.bfloat16).float()
        for row in rows:  # before the sum, which might overflow
            self._scaling.apply(row, start=horovod().rank() * self._part + start)
        return rows.sum(dim=0)

    def _put_own(self, start: int, total: torch.Tensor) -> None:
        self._elements(horovod().rank(), start, start + len(total)).copy_(total)

    def _put_all(self, start: int, received: torch.Tensor) -> None:
        for rank, row in enumerate(received.view(torch.bfloat16)):
            target = self._elements(rank, start, start + len(row))
            target.copy_(row[: len(target)])

    def advance(self) -> bool:
        """Adds a piece of all ranks and sends the sum, or receives the sum of one, if it has arrived."""
        return self._sent.advance()

    @property
    def has_arrived(self) -> bool:
        """Whether all sums are there."""
        return self._sent.has_arrived

    def wait(self) -> None:
        """Waits for the sum."""
        self._sent.wait()


def _start_gather(name: str, total: torch.Tensor) -> Started[torch.Tensor]:
    return start_allgather(total.bfloat16().view(torch.uint8), name)


def _own_shard(bucket: torch.Tensor) -> torch.Tensor:
    return bucket.view(horovod().size(), -1)[horovod().rank()]


class AdasumCompression:
    """Compression for Horovod's Adasum, with the interface of `horovod.torch.Compression`.

    Args:
        compression: "none" or "fp16".
    """

    def __init__(self, compression: str) -> None:
        self.compression = compression

    @torch.no_grad()
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.dtype, list[int] | None]]:
        """Returns the tensor to reduce in place, in row-major order, and the context that `decompress` needs."""
        if tensor.is_sparse:
            raise RuntimeError("sparse gradients are not supported; use torch.nn.Embedding(…, sparse=False)")
        order = _row_major_order(tensor)
        wire = tensor.contiguous() if order is None else tensor.permute(order)
        if self.compression == "fp16":
            wire = wire.half()
        elif wire.dtype in _HALF:
            wire = wire.float()
        return wire, (tensor.dtype, order)

    def decompress(self, tensor: torch.Tensor, context: tuple[torch.dtype, list[int] | None]) -> torch.Tensor:
        """Returns the reduced tensor in its original dtype and order of dimensions."""
        dtype, order = context
        if order is not None:
            tensor = tensor.permute([order.index(dimension) for dimension in range(tensor.dim())])
        return tensor.to(dtype)


def _row_major_order(tensor: torch.Tensor) -> list[int] | None:
    """Returns the order of dimensions that makes a dense tensor (e.g. channels-last) row-major; None if it is."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else None
