"""The positions of gradients in a flat buffer, and its buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

# The default size of buckets: large enough to use the network's bandwidth, small enough that the first reduction
# starts while backward is still running.
BUCKET_MIB = 8
ALIGNMENT = 16  # elements: 64 bytes of float32, a cache line and the widest vector register


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters with gradients that are reduced together.

    Attributes:
        first, last: parameters [first, last) of the buffer.
        start, end: elements [start, end) of the buffer; elements that belong to no parameter are padding.
        flags: start of `last - first` elements of padding, in which each rank flags the parameters that it has
            gradients for.
        control: end of the flags and start of the elements reserved for messages between ranks.
        used: end of those elements; the rest is padding.
    """

    first: int
    last: int
    start: int
    end: int
    flags: int
    control: int
    used: int

    def shard(self, rank: int, ranks: int) -> tuple[int, int]:
        """Returns (start, end) of this rank's shard of the bucket, one of `ranks` equal ones."""
        size = (self.end - self.start) // ranks
        return self.start + rank * size, self.start + (rank + 1) * size


@dataclass
class Layout:
    """The positions of parameters and buckets in a buffer.

    Attributes:
        offsets: first element of each parameter, a multiple of its alignment.
        buckets: in order, without gaps.
        total: length of the buffer in elements.
    """

    offsets: list[int] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    total: int = 0

    @classmethod
    def of(
        cls,
        params: list[Tensor],
        bucket_bytes: int | None = None,
        ranks: int = 1,
        control: int = 0,
        multiple: int = ALIGNMENT,
        alignments: Sequence[int] | None = None,
    ) -> Layout:
        """Returns a layout of parameters in order.

        Buckets are filled from the last parameter backwards, since backward computes its gradient first. A
        parameter larger than `bucket_bytes` has a bucket to itself.

        Args:
            params: of one dtype.
            bucket_bytes: limit of a bucket's gradients; None for one bucket.
            ranks: each bucket is padded so that it divides into this many equal shards.
            control: elements to reserve after the flags of the first bucket.
            multiple: the length of a shard is a multiple of it; a multiple of ALIGNMENT.
            alignments: for each parameter what its offset is a multiple of, a divisor of `multiple`; None:
                ALIGNMENT.
        """
        layout = cls()
        alignments = alignments or [ALIGNMENT] * len(params)
        for first, last in pairwise(_bounds(params, bucket_bytes)):
            start = layout.total
            for p, alignment in zip(params[first:last], alignments[first:last], strict=True):
                layout.total = _aligned(layout.total, alignment)
                layout.offsets.append(layout.total)
                layout.total += _aligned(p.numel())
            flags = layout.total
            end = flags + last - first
            used = end if layout.buckets else end + control
            layout.total = start + _aligned(used - start, multiple * ranks)
            layout.buckets.append(Bucket(first, last, start, layout.total, flags, end, used))
        return layout


def _bounds(params: list[Tensor], bucket_bytes: int | None) -> list[int]:
    """Returns the index of each bucket's first parameter, followed by the number of parameters."""
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
