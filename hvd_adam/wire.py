"""How a gradient travels: what Horovod's collectives cannot carry, or would spoil, is made fit for them here.

Horovod takes row-major tensors only, knows no bfloat16, and adds float16 in float16, where a sum of ranks
overflows although their mean does not. `Wire` has the interface of `horovod.torch.Compression`.
"""

from __future__ import annotations

import torch

from hvd_adam.cluster import horovod

COMPRESSIONS = ("none", "fp16", "bf16")
_HALF = (torch.float16, torch.bfloat16)


class Wire:
    """Turns a tensor into one that Horovod can reduce, and back.

    "none": float32 and float64 travel as they are, half-precision gradients as float32, so that nothing is
    lost in the sum. "fp16": everything travels as float16, divided beforehand, so that the sum over any number of
    ranks and micro-batches stays in float16's range (6e-8 to 65504); the reduction must then be a sum.

    Args:
        compression: "none" or "fp16" ("bf16" is `Bfloat16Mean`'s).
        divisor: world size × micro-batches where fp16 is to yield the mean, 1 where it is not (Adasum).
    """

    def __init__(self, compression: str, divisor: int) -> None:
        self.compression = compression
        self.divisor = divisor

    @torch.no_grad()
    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.dtype, list[int] | None]]:
        """Returns the tensor to reduce in place, and what `decompress` needs."""
        if tensor.is_sparse:
            raise RuntimeError("sparse gradients are not supported; use torch.nn.Embedding(…, sparse=False)")
        order = _row_major_order(tensor)
        wire = tensor.contiguous() if order is None else tensor.permute(order)
        if self.compression == "fp16":
            wire = (wire / self.divisor).half()
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
    """The order of dimensions in which a dense tensor (channels-last, say) is row-major; None if it is already.

    Ranks whose layouts differ then submit different shapes, which Horovod refuses, instead of adding
    elements that do not belong together.
    """
    if tensor.is_contiguous():
        return None
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return order if tensor.permute(order).is_contiguous() else None


class Bfloat16Mean:
    """The mean of one gradient over the ranks with bfloat16 on the wire, added in float32.

    Every rank sends the r-th part of its gradient to rank r, which adds the parts in rank order, and gets
    everyone's sums back: 2·(N−1)/N·n elements of 2 bytes, as many as a ring all-reduce moves. Each gradient
    is rounded once on its way out and its mean once on its way back (relative error ≤ 2⁻⁸ each), nothing in
    between; range is float32's. The bits travel as bytes, which every transport of Horovod can carry.

    Created inside the backward hook, it starts sending; `share` adds and starts the way back; calling it
    waits for the result, which has the gradient's shape and float32 (float64 for a float64 gradient).
    """

    def __init__(self, gradient: torch.Tensor, name: str) -> None:
        self._hvd = horovod()
        self._name = name
        self._shape, self._numel = gradient.shape, gradient.numel()
        self._shared: int | None = None
        ranks = self._hvd.size()
        part = -(-self._numel // ranks)
        parts = torch.zeros(ranks * part, dtype=torch.bfloat16, device=gradient.device)
        parts[: self._numel] = gradient.reshape(-1)
        self._sent = self._hvd.alltoall_async(parts.view(torch.uint8), name=f"{name}.parts")

    def share(self) -> None:
        """Waits for the parts of all ranks, adds them, and starts to send the sums back."""
        received, _ = self._hvd.synchronize(self._sent)
        parts = received.view(torch.bfloat16).view(self._hvd.size(), -1)
        mean = parts.float().sum(dim=0) / self._hvd.size()
        self._shared = self._hvd.allgather_async(mean.bfloat16().view(torch.uint8), name=f"{self._name}.mean")

    def __call__(self) -> torch.Tensor:
        """Waits for the mean."""
        if self._shared is None:
            self.share()
        mean = self._hvd.synchronize(self._shared).view(torch.bfloat16)
        return mean[: self._numel].float().view(self._shape)
