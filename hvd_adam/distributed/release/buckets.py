"""The buckets of gradients that are released: complete, reduced, used by the update, and given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.bucket_layout import Bucket, Layout
from hvd_adam.distributed.gradients.compression import Reduction, Scaling, is_half, start_reduction
from hvd_adam.distributed.gradients.missing_ranks import explained
from hvd_adam.optim.memory import copy_scaled
from hvd_adam.optim.validation import check_gradient

LIVE = 2  # bucket buffers: one is reduced while another is filled


class Round(Protocol):
    """What buckets need of the averager that follows the backward pass."""

    def round_begins(self) -> None:
        """Called before the first bucket is sent to the other ranks."""

    def waiting(self) -> AbstractContextManager[None]:
        """Returns a context in which time counts as time spent waiting for other ranks."""

    def use(self, number: int) -> None:
        """Updates the parameters of a bucket, whose gradients are the mean over all ranks."""


class ReleasedBuckets:
    """Buckets that are used, and released, as soon as their gradients are complete; here those of one process.

    A bucket never has a buffer here: the update reads the tensors that autograd has made.

    Args:
        buckets: the parameters of each bucket.
        averager: uses them.

    Attributes:
        number: the bucket of each parameter.
    """

    def __init__(self, buckets: Sequence[Sequence[Tensor]], averager: Round) -> None:
        self._buckets, self._round = buckets, averager
        self.number: Mapping[Tensor, int] = {p: i for i, bucket in enumerate(buckets) for p in bucket}
        self.rearm()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of buckets that exist now."""
        return 0

    @property
    def untouched(self) -> bool:
        """Whether no bucket of this update has been sent or used."""
        return not self._released

    def parameters(self, number: int) -> Sequence[Tensor]:
        """Returns the parameters of a bucket."""
        return self._buckets[number]

    def rearm(self) -> None:
        """Called after an update: every bucket is incomplete again."""
        self._missing = [set(bucket) for bucket in self._buckets]
        self._released: set[int] = set()

    def released(self, p: Tensor) -> bool:
        """Returns whether the gradient of a parameter has been taken for this update."""
        return self.number.get(p) in self._released

    def add(self, p: Tensor) -> None:
        """Called when the gradient of a parameter is complete."""
        number = self.number.get(p)
        if number is None or number in self._released:
            return
        self._missing[number].discard(p)
        if not self._missing[number]:
            self._complete(number)

    def finish(self) -> None:
        """Uses all buckets that are left, and whose parameters may lack gradients. Every rank must call it."""
        for number in reversed(range(len(self._buckets))):
            if number not in self._released:
                self._complete(number)

    def _complete(self, number: int) -> None:
        self._released.add(number)
        self._use(number)

    def _use(self, number: int) -> None:
        self._round.use(number)
        for p in self._buckets[number]:
            p.grad = None


class Place(NamedTuple):
    """Where the gradients of a bucket lie in its buffer.

    Attributes:
        bucket: of the layout.
        params: its parameters.
        views: for each parameter shape, strides and offset.
    """

    bucket: Bucket
    params: Sequence[Tensor]
    views: Sequence[tuple[torch.Size, tuple[int, ...], int]]

    @property
    def elements(self) -> int:
        """The length of the buffer."""
        return self.bucket.end - self.bucket.start

    @property
    def flags(self) -> slice:
        """The elements that flag which parameters have gradients."""
        start = self.bucket.flags - self.bucket.start
        return slice(start, start + len(self.params))

    def gradients(self, buffer: Tensor) -> list[Tensor]:
        """Returns the gradients of all parameters as views of the buffer."""
        return [buffer.as_strided(*view) for view in self.views]


def places_of(params: Sequence[Tensor], layout: Layout) -> list[Place]:
    """Returns the places of the buckets of parameters of one device and dtype, with the layout of all of them."""
    strides = [torch.empty_like(p, device="meta").stride() for p in params]
    found = []
    for bucket in layout.buckets:
        inside = range(bucket.first, bucket.last)
        views = [(params[i].shape, strides[i], layout.offsets[i] - bucket.start) for i in inside]
        found.append(Place(bucket, params[bucket.first : bucket.last], views))
    return found


class _InFlight(NamedTuple):
    buffer: Tensor
    reduction: Reduction


class ReducedBuckets(ReleasedBuckets):
    """Buckets that are added over the ranks before they are used, with at most `LIVE` buffers at a time.

    The gradients of a complete bucket move to a buffer, which is reduced. If all buffers are in flight, the oldest
    one is waited for and used first. Every rank sends the buckets in the same order: a rank waits for one in the
    middle of its backward pass, so the others must send that one before those that they wait for. A bucket that is
    complete earlier than in that order waits, with its gradients where autograd has put them.

    Args:
        places: of all buckets.
        averager: as in `ReleasedBuckets`.
        order: numbers of the buckets in the order in which they are sent, identical on all ranks.
        start: starts the reduction of a buffer, of a bucket's number, with the factor that is left to apply.
        ranks: number of ranks.
        kept_bytes: buffers of at most so many bytes are kept for later buckets of the same update.
    """

    def __init__(
        self,
        places: Sequence[Place],
        averager: Round,
        *,
        order: Sequence[int],
        start: Callable[[Tensor, int, Scaling], Reduction],
        ranks: int,
        kept_bytes: int,
    ) -> None:
        super().__init__([place.params for place in places], averager)
        self._places, self._order, self._start, self._ranks = places, order, start, ranks
        self._kept_bytes = kept_bytes
        self._free: list[torch.UntypedStorage] = []
        self._in_flight: dict[int, _InFlight] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of buckets that exist now."""
        sent = (sent.buffer.untyped_storage() for sent in self._in_flight.values())
        return sum(storage.nbytes() for storage in (*self._free, *sent))

    def finish(self) -> None:
        """Sends, receives and uses all buckets that are left; no buffer remains. Every rank must call it.

        Raises:
            HorovodInternalError: another rank has ended, or is in another collective.
        """
        for number in self._order:
            if number not in self._released:
                self._send(number)
        while self._in_flight:
            self._receive()
        self._free.clear()

    def _complete(self, number: int) -> None:
        for due in self._order[len(self._released) :]:
            if self._missing[due]:
                break
            self._send(due)

    def _send(self, number: int) -> None:
        if not self._released:
            self._round.round_begins()
        if len(self._in_flight) == LIVE:
            self._receive()
        self._released.add(number)
        place = self._places[number]
        buffer = self._buffer(place)
        later = is_half(buffer.dtype)  # multiplied in float32, after a conversion
        self._collect(place, buffer, 1.0 if later else 1 / self._ranks)
        scaling = Scaling(1 / self._ranks, place.flags.start) if later else Scaling()
        with explained():
            self._in_flight[number] = _InFlight(buffer, self._start(buffer, number, scaling))

    def _collect(self, place: Place, buffer: Tensor, scale: float) -> None:
        """Moves the gradients of a bucket into its buffer. Elements between them keep whatever they are."""
        views, grads = place.gradients(buffer), [p.grad for p in place.params]
        present = [i for i, grad in enumerate(grads) if grad is not None]
        for i in present:
            check_gradient(place.params[i])
        if present:
            copy_scaled([views[i] for i in present], [g for g in grads if g is not None], scale)
        if absent := [view for view, grad in zip(views, grads, strict=True) if grad is None]:
            torch._foreach_zero_(absent)
        buffer[place.flags.start :].zero_()
        buffer[place.flags].copy_(torch.tensor([grad is not None for grad in grads], device="cpu"))
        for p in place.params:
            p.grad = None

    def _receive(self) -> None:
        """Waits for the bucket that was sent first, and uses it."""
        number = next(iter(self._in_flight))
        buffer, reduction = self._in_flight[number]
        with self._round.waiting(), explained():
            reduction.start_gather()
            reduction.wait()
        del self._in_flight[number]
        place = self._places[number]
        used = (buffer[place.flags] > 0).tolist()
        for p, gradient, is_used in zip(place.params, place.gradients(buffer), used, strict=True):
            p.grad = gradient if is_used else None
        self._use(number)
        if buffer.untyped_storage().nbytes() <= self._kept_bytes:
            self._free.append(buffer.untyped_storage())

    def _buffer(self, place: Place) -> Tensor:
        """Returns a buffer for a bucket: one that is free, or a new one, which later buckets can use, too."""
        buffer = torch.empty(0, dtype=place.params[0].dtype, device="cpu")
        nbytes = place.elements * buffer.element_size()
        if self._free and nbytes <= self._kept_bytes:
            storage = self._free.pop()
        else:
            self._free.clear()  # or there would be more than `LIVE`
            storage = torch.UntypedStorage(max(nbytes, self._kept_bytes), device="cpu")  # type: ignore[no-untyped-call]
        buffer.set_(storage, 0, (place.elements,))  # type: ignore[call-overload]
        return buffer


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


def starter(prefix: str, compression: str) -> Callable[[Tensor, int, Scaling], Reduction]:
    """Returns a function that starts the reduction of a bucket, as `ReducedBuckets` takes it.

    Args:
        prefix: of the names of the collectives.
        compression: as in `start_reduction`.
    """
    return lambda buffer, number, scaling: start_reduction(
        buffer, f"{prefix}.{number}", compression, scaling=scaling
    )
