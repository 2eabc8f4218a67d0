"""How gradients travel: what Horovod's collectives cannot carry, or would spoil, is made fit for them here.

Horovod knows no bfloat16, and adds float16 in float16, where a sum of ranks overflows although their mean does
not.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hvd_adam.distributed.context import horovod

COMPRESSIONS = ("none", "fp16", "bf16")
_HALF = (torch.float16, torch.bfloat16)


class Reduction(Protocol):
    """The sum of one contiguous bucket over the ranks, under way from construction on."""

    def start_gather(self) -> None:
        """Does what remains to be started before `wait`; call it on all reductions first."""

    def wait(self) -> None:
        """Returns when the bucket holds the result."""


def reduce(bucket: torch.Tensor, name: str, compression: str, divisor: int, scatter: bool = False) -> Reduction:
    """Starts to reduce a contiguous, 1-dimensional bucket of gradients in place, over all ranks.

    Args:
        bucket: must not be touched until `wait` has returned.
        name: alike on all ranks, and of no other reduction under way.
        compression: "none", "fp16" or "bf16".
        divisor: world size × micro-batches, by which fp16 divides before it adds.
        scatter: leave the result in this rank's part of the bucket only, the rank-th of N equal parts; half the
            traffic. The length of the bucket must then be a multiple of N.
    """
    if compression == "bf16":
        return Bf16AllReduce(bucket, name, scatter)
    return AllReduce(bucket, name, compression, divisor, scatter)


def divided(compression: str, ranks: int, divisor: int) -> int:
    """By how much of `divisor` = ranks × micro-batches the result of `reduce` is divided already."""
    return {"none": 1, "fp16": divisor, "bf16": ranks}[compression]


class AllReduce:
    """The sum over the ranks, in place wherever the dtype allows.

    "none": float32 and float64 travel as they are, half-precision gradients as float32, so that nothing is lost
    in the sum. "fp16": everything travels as float16, divided by `divisor` beforehand, so that the sum over any
    number of ranks and micro-batches stays in float16's range (6e-8 to 65504).
    """

    def __init__(
        self, bucket: torch.Tensor, name: str, compression: str, divisor: int, scatter: bool = False
    ) -> None:
        self._hvd = hvd = horovod()
        self._bucket = self._wire = bucket
        self._name, self._scatter = name, scatter
        if compression == "fp16":
            self._wire = (bucket / divisor).half()
        elif bucket.dtype in _HALF:
            self._wire = bucket.float()
        if scatter:
            self._handle = hvd.reducescatter_async(self._wire, op=hvd.Sum, name=name)
        else:  # a group of one: Horovod fuses it with nothing, and reduces it where it lies
            self._handle = hvd.grouped_allreduce_async_([self._wire], op=hvd.Sum, name=name)

    def start_gather(self) -> None:
        """Nothing: the sum comes back by itself."""

    def wait(self) -> None:
        """Waits for the sum."""
        received = self._hvd.synchronize(self._handle)
        if self._scatter:
            _own_part(self._bucket).copy_(received)
        elif self._wire is not self._bucket:
            self._bucket.copy_(self._wire)


class Bf16AllReduce:
    """The mean of one bucket over the ranks with bfloat16 on the wire, added in float32.

    Every rank sends the r-th part of its bucket to rank r, which adds the parts in rank order, and gets
    everyone's sums back: 2·(N−1)/N·n elements of 2 bytes, as many as a ring all-reduce moves. Each gradient
    is rounded once on its way out and its mean once on its way back (relative error ≤ 2⁻⁸ each), nothing in
    between; range is float32's. The bits travel as bytes, which every transport of Horovod can carry.
    """

    def __init__(self, bucket: torch.Tensor, name: str, scatter: bool = False) -> None:
        self._hvd = horovod()
        self._bucket, self._name, self._scatter = bucket, name, scatter
        ranks = self._hvd.size()
        part = -(-bucket.numel() // ranks)
        parts = torch.zeros(ranks * part, dtype=torch.bfloat16, device=bucket.device)
        parts[: bucket.numel()] = bucket
        self._sent = self._hvd.alltoall_async(parts.view(torch.uint8), name=f"{name}.parts")

    def start_gather(self) -> None:
        """Waits for the parts of all ranks, adds them, and starts to send the sums back where they are wanted."""
        received, _ = self._hvd.synchronize(self._sent)
        parts = received.view(torch.bfloat16).view(self._hvd.size(), -1)
        self._mean = parts.float().sum(dim=0) / self._hvd.size()
        if not self._scatter:
            mean = self._mean.bfloat16().view(torch.uint8)
            self._gathered = self._hvd.allgather_async(mean, name=f"{self._name}.mean")

    def wait(self) -> None:
        """Waits for the mean."""
        if self._scatter:
            _own_part(self._bucket).copy_(self._mean)
        else:
            mean = self._hvd.synchronize(self._gathered).view(torch.bfloat16)
            self._bucket.copy_(mean[: self._bucket.numel()])


def _own_part(bucket: torch.Tensor) -> torch.Tensor:
    return bucket.view(horovod().size(), -1)[horovod().rank()]


class AdasumWire:
    """The interface of `horovod.torch.Compression`, for the wrapper's Adasum: "none" or "fp16", row-major."""

    def __init__(self, compression: str) -> None:
        self.compression = compression

    @torch.no_grad()
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.dtype, list[int] | None]]:
        """Returns the tensor to reduce in place, and what `decompress` needs."""
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
        """Returns the reduced tensor in its own dtype and order of dimensions."""
        dtype, order = context
        if order is not None:
            tensor = tensor.permute([order.index(dimension) for dimension in range(tensor.dim())])
        return tensor.to(dtype)


def _row_major_order(tensor: torch.Tensor) -> list[int] | None:
    """The order of dimensions in which a dense tensor (channels-last, say) is row-major; None if it is already."""
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else None
