"""`BucketNoise`: squared norms of gradients in buckets, before and after they are averaged, for a `NoiseMeter`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.noise.meter import GRADIENT, NoiseMeter
from hvd_adam.distributed.noise.preconditioner import Gradient


class BucketNoise:
    """Measures one round of reductions, if an update is due. Otherwise it does nothing.

    Args:
        meter: receives the measurements.
        buckets: in the order of their numbers. The one that is sent last has `meter.length` elements at its end.
        last: its number.
        scatters: whether each rank receives the mean of its own shard of a bucket only.

    Attributes:
        in_parts: whether the numbers of all ranks have to be added.
    """

    def __init__(
        self,
        meter: NoiseMeter,
        buckets: Sequence[tuple[GradientBuffer, Bucket]],
        last: int,
        scatters: bool,
    ) -> None:
        self._meter, self._buckets, self._last = meter, buckets, last
        self._mean_shard = (horovod().rank(), horovod().size()) if scatters else meter.shard
        self.in_parts = self._mean_shard[1] > 1
        self._words: Tensor | None = None  # what this rank sends in this round

    @property
    def due(self) -> bool:
        """Whether this round is measured."""
        return self._meter.due

    @property
    def waits(self) -> bool:
        """Whether no part of a bucket may be updated before `measure_mean`, because this round is measured."""
        return self._words is not None

    def measure_own(
        self, number: int, scale: float, square: Tensor | None, *, is_first: bool, has_gradient: bool
    ) -> None:
        """Called before a bucket is sent, when it holds this rank's own gradients.

        Args:
            number: of the bucket.
            scale: the factor that the elements are to be multiplied by, for their sum over the ranks to be the
                mean.
            square: squared 2-norm of its gradients; None: it is not known yet.
            is_first: whether it begins a round.
            has_gradient: whether this rank has the gradient of any of its parameters.
        """
        meter = self._meter
        if not meter.due:
            return
        if is_first:
            meter.begin_round()
        buffer, bucket = self._buckets[number]
        factor = (horovod().size() * scale) ** 2
        if square is None or meter.form != GRADIENT:
            square = meter.square_norm(_pieces(buffer, bucket, *bucket.shard(*meter.shard)), buffer.device)
        meter.add_own(square.double() * factor, has_gradient=has_gradient)
        if number == self._last:
            self._words = meter.words()
            self._place.copy_(self._words)

    def measure_mean(self, number: int) -> None:
        """Called when a bucket has arrived, before its parameters are updated."""
        if self._words is not None:
            buffer, bucket = self._buckets[number]
            pieces = _pieces(buffer, bucket, *bucket.shard(*self._mean_shard))
            self._meter.add_mean(self._meter.square_norm(pieces, buffer.device))

    def numbers(self) -> Tensor:
        """Returns the words and the squared norm of the mean, float32 on the CPU; nothing if nothing is measured.

        Both are of this rank if `in_parts`. Otherwise the words of all ranks have arrived with the last bucket.
        """
        if self._words is None:
            return torch.empty(0, dtype=torch.float32, device="cpu")
        words = self._words if self.in_parts else self._place.float()
        return torch.cat([words, self._meter.mean()]).cpu()

    def receive(self, numbers: Tensor) -> None:
        """Ends the round with `numbers` of all ranks."""
        if self._words is not None:
            *words, mean = numbers.tolist()
            self._meter.receive(words, mean)
            self._place.zero_()
            self._words = None

    @property
    def _place(self) -> Tensor:
        buffer, bucket = self._buckets[self._last]
        return buffer.grad[bucket.used - self._meter.length : bucket.used]


def _pieces(buffer: GradientBuffer, bucket: Bucket, start: int, end: int) -> list[Gradient]:
    """Returns the gradients of each parameter of a bucket that are elements [start, end) of the buffer.

    Between the parameters codes leave their errors.
    """
    found = []
    for i in range(bucket.first, bucket.last):
        p, offset = buffer.params[i], buffer.layout.offsets[i]
        a, b = max(offset, start), min(offset + p.numel(), end)
        if a < b:
            found.append(Gradient(p, buffer.grad[a:b]))
    return found
