"""`Place`: where the gradients of a bucket that is released lie while it is reduced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import ALLREDUCE_BYTES
from hvd_adam.distributed.gradients.bucket_layout import Bucket, Layout


class Place(NamedTuple):
    """Where the gradients of a bucket lie in its buffer.

    Attributes:
        bucket: of the layout.
        params: its parameters.
        views: for each parameter shape, strides and offset.
        in_place: number of elements, whole pieces of the all-reduce, that are reduced where autograd has put the
            gradient of the only parameter; 0 for none.
    """

    bucket: Bucket
    params: Sequence[Tensor]
    views: Sequence[tuple[torch.Size, tuple[int, ...], int]]
    in_place: int = 0

    @property
    def elements(self) -> int:
        """The length of the buffer."""
        return self.bucket.end - self.bucket.start - self.in_place

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.elements * self.params[0].element_size()

    @property
    def flags(self) -> slice:
        """The elements that flag which parameters have gradients."""
        start = self.bucket.flags - self.bucket.start - self.in_place
        return slice(start, start + len(self.params))

    def gradients(self, buffer: Tensor) -> list[Tensor]:
        """Returns the gradients of all parameters as views of the buffer, which holds whole ones."""
        return [buffer.as_strided(*view) for view in self.views]


def places_of(params: Sequence[Tensor], layout: Layout, *, in_place: bool) -> list[Place]:
    """Returns the places of the buckets of parameters.

    Args:
        params: of one device and dtype.
        layout: of all of them.
        in_place: reduce what is large in place. Pieces of the all-reduce have the same bounds as in a buffer, so
            that every sum has the same bits.
    """
    piece = ALLREDUCE_BYTES // params[0].element_size()
    strides = [torch.empty_like(p, device="meta").stride() for p in params]
    found = []
    for bucket in layout.buckets:
        inside = range(bucket.first, bucket.last)
        views = [(params[i].shape, strides[i], layout.offsets[i] - bucket.start) for i in inside]
        whole = params[bucket.first].numel() // piece * piece if in_place and len(inside) == 1 else 0
        found.append(Place(bucket, params[bucket.first : bucket.last], views, whole))
    return found


def send_order(buckets: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]) -> list[int]:
    """Returns the numbers of buckets in the order in which backward completes them, as far as that is known.

    Backward computes the gradients of the last parameters first. A bucket is complete with its first parameter.

    Args:
        buckets: the parameters of each.
        parameters: all parameters, in the order in which forward uses them.
    """
    position = {p: i for i, p in enumerate(parameters)}
    first = [min(position.get(p, 0) for p in bucket) for bucket in buckets]
    return sorted(range(len(buckets)), key=first.__getitem__, reverse=True)
