"""`Buckets`: the buckets of flat gradients by number, and the place of each gradient in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.flags import Located
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.optim.formats.random_bits import BLOCK


class Buckets:
    """The buckets of all buffers, numbered in the order of their parameters.

    Args:
        buffers: identical on all ranks, at least one.
        scale: factor that makes the mean of a sum over ranks and micro-batches.
        scatter: each rank receives the sum of its own shard of a bucket only.

    Attributes:
        number: the bucket of each parameter.
        scale, scatters: as the arguments `scale` and `scatter`.
    """

    def __init__(self, buffers: Sequence[GradientBuffer], scale: float, scatter: bool) -> None:
        self._buffers, self.scale, self.scatters = buffers, scale, scatter
        self._buckets: list[Located] = [(buffer, bucket) for buffer in buffers for bucket in buffer.layout.buckets]
        self.number: Mapping[Tensor, int] = {
            p: number
            for number, (buffer, bucket) in enumerate(self._buckets)
            for p in buffer.params[bucket.first : bucket.last]
        }
        self._index = {p: i for buffer in buffers for i, p in enumerate(buffer.params)}

    @property
    def parameters(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each bucket."""
        return [tuple(buffer.params[bucket.first : bucket.last]) for buffer, bucket in self._buckets]

    def respect_held_gradients(self) -> None:
        """Called before a round: user code may hold gradients, of now and of earlier rounds."""
        for buffer in self._buffers:
            buffer.leave_kept_gradients()
            if not self.scatters:  # else the gradients are not whole when the round ends
                buffer.remember_assigned()

    def give_back(self) -> None:
        """Called after the last round: tensors that user code has assigned become the gradients again."""
        for buffer in self._buffers:
            buffer.give_back()

    def place(self, p: Tensor) -> Tensor:
        """Returns the view of the buffer that holds the averaged gradient of `p`."""
        buffer, _ = self._buckets[self.number[p]]
        return buffer.grad_view(self._index[p])

    def spread(self) -> None:
        """After a scattered round, makes the averaged shards what the ranks contribute to another round.

        Each rank contributes its own shard, undivided, and zeros for the others.
        """
        for buffer, bucket in self._buckets:
            own = self._own(buffer.grad, bucket)
            mean = own / self.scale
            buffer.grad[bucket.start : bucket.end].zero_()
            own.copy_(mean)

    def elements(self, number: int, start: int, end: int) -> dict[Tensor, tuple[int, int]]:
        """Returns (first, last) of the elements of each parameter in a part of a bucket, in whole blocks.

        The rest of a block is part of the next part.

        Args:
            number: of the bucket.
            start: first element of the part, as an index into the buffer.
            end: element after its last one.
        """
        buffer, bucket = self._buckets[number]
        found = {}
        for i in range(bucket.first, bucket.last):
            offset, length = buffer.layout.offsets[i], buffer.params[i].numel()
            places = (max(0, place - offset) for place in (start, end))
            first, last = (length if place >= length else place - place % BLOCK for place in places)
            if first < last or (length == 0 and start == bucket.start):
                found[buffer.params[i]] = first, last
        return found

    def _own(self, gradients: Tensor, bucket: Bucket) -> Tensor:
        """Returns the gradients of a bucket that this rank has the sum of."""
        start, end = self._own_span(bucket)
        return gradients[start:end]

    def _own_span(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.shard(horovod().rank(), horovod().size()) if self.scatters else (bucket.start, bucket.end)
