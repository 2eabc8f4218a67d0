"""Where parameters lie in flat buffers, and which of them can. Pure: nothing is moved here."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

ALIGNMENT = 16  # elements: 64 bytes of float32, a cache line and the widest vector register


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters whose gradients travel together.

    Attributes:
        first, last: parameters [first, last) of the storage.
        start, end: elements [start, end) of the buffers; what is not parameters is padding.
        flags: where `last - first` elements begin in which ranks say what they have used.
    """

    first: int
    last: int
    start: int
    end: int
    flags: int

    def shard(self, rank: int, ranks: int) -> tuple[int, int]:
        """The elements of the bucket that are this rank's own where it is shared out evenly."""
        size = (self.end - self.start) // ranks
        return self.start + rank * size, self.start + (rank + 1) * size


@dataclass
class Layout:
    """Where parameters lie in a buffer, and in which bucket: every parameter begins at a multiple of ALIGNMENT."""

    offsets: list[int] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    total: int = 0

    @classmethod
    def of(cls, params: list[Tensor], bucket_bytes: int | None = None, ranks: int = 1) -> Layout:
        """Lays out parameters in order; without `bucket_bytes` in one bucket, otherwise in as many as are needed.

        Buckets are filled from the last parameter on, the first whose gradient backward has ready; a
        parameter larger than a bucket is one by itself. Each is padded for `ranks` equal parts.
        """
        layout = cls()
        for first, last in pairwise(_bounds(params, bucket_bytes)):
            start = layout.total
            for p in params[first:last]:
                layout.offsets.append(layout.total)
                layout.total += _aligned(p.numel())
            flags = layout.total
            layout.total = start + _aligned(flags + last - first - start, ALIGNMENT * ranks)
            layout.buckets.append(Bucket(first, last, start, layout.total, flags))
        return layout


def _bounds(params: list[Tensor], bucket_bytes: int | None) -> list[int]:
    bounds, filled = [len(params)], 0
    for i in reversed(range(len(params))):
        size = params[i].numel() * params[i].element_size()
        if bucket_bytes is not None and filled and filled + size > bucket_bytes:
            bounds.append(i + 1)
            filled = 0
        filled += size
    return [0, *reversed(bounds)] if params else [0]


def _aligned(elements: int, multiple: int = ALIGNMENT) -> int:
    return -(-elements // multiple) * multiple


def can_be_flattened(p: Tensor) -> bool:
    """Whether a buffer can hold it: an ordinary tensor of this process whose elements do not overlap."""
    ordinary = type(p) in (torch.nn.Parameter, Tensor) and p.device.type in ("cpu", "cuda")
    extent = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += stride * (size - 1)
    # Moved out of shared memory it would be lost to the other processes. (On GPUs every tensor counts as shared.)
    return ordinary and not (p.is_cpu and p.is_shared())


def overlapping(params: list[Tensor]) -> set[Tensor]:
    """Those that share memory with another: apart from each other they would no longer be the same numbers."""
    shared: set[Tensor] = set()
    reach, owner = 0, None
    for p in sorted((p for p in params if p.numel() and p.layout == torch.strided), key=lambda p: p.data_ptr()):
        if p.data_ptr() < reach:
            shared |= {owner, p}
        extent = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) + 1
        if p.data_ptr() + extent * p.element_size() > reach:
            reach, owner = p.data_ptr() + extent * p.element_size(), p
    return shared
