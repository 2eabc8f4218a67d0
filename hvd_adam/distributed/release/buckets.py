"""The buckets of gradients that are released: complete, reduced, used by the update, and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import ALLREDUCE_BYTES, start_allreduce
from hvd_adam.distributed.gradients.compression import Reduction, Scaling, is_half, start_reduction
from hvd_adam.distributed.gradients.missing_ranks import explained
from hvd_adam.distributed.release.places import Place
from hvd_adam.optim.memory import any_is_held, copy_scaled, memory_order
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
        """Bytes of the buckets that are being reduced now, and of free buffers."""
        return 0

    @property
    def untouched(self) -> bool:
        """Whether no bucket of this update has been sent or used."""
        return not self._released

    def parameters(self, number: int) -> Sequence[Tensor]:
        """Returns the parameters of a bucket."""
        return self._buckets[number]

    def expect(self, p: Tensor) -> None:
        """Called before autograd adds to the gradient of a parameter."""
        if p.grad is None:
            self._fresh.add(p)

    def rearm(self) -> None:
        """Called after an update: every bucket is incomplete again."""
        self._fresh: set[Tensor] = set()  # parameters whose gradients autograd has made
        self._arriving: Tensor | None = None  # the parameter whose gradient autograd is about to let go
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
            self._arriving = p
            self._complete(number)
            self._arriving = None

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


class _InFlight(NamedTuple):
    gradients: Sequence[Tensor]
    buffer: Tensor
    reduction: Reduction | _InPlace


class _InPlace:
    """The sum of a large gradient over the ranks where it lies, and of its end in a buffer, which has the flags.

    Args:
        gradient: 1-dimensional.
        whole: number of elements to reduce in place, whole pieces of the all-reduce.
        end: the buffer, with the elements that are left.
        name: of the collectives.
    """

    def __init__(self, gradient: Tensor, whole: int, end: Tensor, name: str) -> None:
        self._left, self._end = gradient[whole:], end
        pieces = whole * gradient.element_size() // ALLREDUCE_BYTES
        self._parts = [start_allreduce(gradient[:whole], name), start_allreduce(end, f"{name}.{pieces}")]

    def wait(self) -> None:
        """Waits for the sum."""
        for started in self._parts:
            started()
        self._left.copy_(self._end[: len(self._left)])


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
        prefix: prefix of the names of the collectives.
        compression: as in `start_reduction`.
        ranks: number of ranks.
        kept_bytes: size of buffers that are kept for later buckets of the same update. What needs more, and the
            end of a gradient that is reduced in place, has a buffer of its own.
    """

    def __init__(
        self,
        places: Sequence[Place],
        averager: Round,
        *,
        order: Sequence[int],
        prefix: str,
        compression: str,
        ranks: int,
        kept_bytes: int,
    ) -> None:
        super().__init__([place.params for place in places], averager)
        self._places, self._order, self._prefix, self._compression = places, order, prefix, compression
        self._ranks, self._kept_bytes = ranks, kept_bytes
        self._free: list[torch.UntypedStorage] = []
        self._in_flight: dict[int, _InFlight] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the buckets that are being reduced now, and of free buffers."""
        tensors = (t for sent in self._in_flight.values() for t in (sent.buffer, *sent.gradients))
        storages = (*self._free, *map(Tensor.untyped_storage, tensors))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

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
        with explained():
            start = self._start_in_place if place.in_place else self._start_in_buffer
            self._in_flight[number] = start(place, f"{self._prefix}.{number}")
        for p in place.params:
            p.grad = None

    def _start_in_buffer(self, place: Place, name: str) -> _InFlight:
        """Moves the gradients of a bucket into a buffer, and reduces it.

        Elements between the gradients keep whatever they are.
        """
        buffer = self._buffer(place)
        views, grads = place.gradients(buffer), [p.grad for p in place.params]
        present = [i for i, grad in enumerate(grads) if grad is not None]
        for i in present:
            check_gradient(place.params[i])
        later = is_half(buffer.dtype)  # multiplied in float32, after a conversion
        if present:
            scale = 1.0 if later else 1 / self._ranks
            copy_scaled([views[i] for i in present], [g for g in grads if g is not None], scale)
        if absent := [view for view, grad in zip(views, grads, strict=True) if grad is None]:
            torch._foreach_zero_(absent)
        self._flag(place, buffer)
        scaling = Scaling(1 / self._ranks, place.flags.start) if later else Scaling()
        return _InFlight(views, buffer, start_reduction(buffer, name, self._compression, scaling=scaling))

    def _start_in_place(self, place: Place, name: str) -> _InFlight:
        """Reduces a large gradient where autograd has put it, if nothing else has its memory, or else a copy.

        Nodes of backward that have not run may read the same memory: those of a + b pass one gradient to both.
        """
        (p,) = place.params
        gradient = p.grad
        if gradient is None:
            gradient = torch.zeros_like(p)
        else:
            check_gradient(p)
            usual = p in self._fresh and gradient.stride() == place.views[0][1]
            if not usual or any_is_held([gradient], are_gradients=True, aliases=int(p is self._arriving)):
                gradient = torch.empty_like(p).copy_(gradient)
        flat, buffer = memory_order(gradient, 0, p.numel()), self._buffer(place)
        flat.mul_(1 / self._ranks)
        left = flat[place.in_place :]
        buffer[: len(left)] = left
        self._flag(place, buffer)
        return _InFlight([gradient], buffer, _InPlace(flat, place.in_place, buffer, name))

    def _flag(self, place: Place, buffer: Tensor) -> None:
        buffer[place.flags.start :].zero_()
        present = [p.grad is not None for p in place.params]
        buffer[place.flags].copy_(torch.tensor(present, device="cpu"))

    def _receive(self) -> None:
        """Waits for the bucket that was sent first, and uses it."""
        number = next(iter(self._in_flight))
        gradients, buffer, reduction = self._in_flight[number]
        with self._round.waiting(), explained():
            reduction.wait()
        del self._in_flight[number]
        place = self._places[number]
        used = (buffer[place.flags] > 0).tolist()
        for p, gradient, is_used in zip(place.params, gradients, used, strict=True):
            p.grad = gradient if is_used else None
        self._use(number)
        if buffer.untyped_storage().nbytes() == self._kept_bytes:
            self._free.append(buffer.untyped_storage())

    def _buffer(self, place: Place) -> Tensor:
        """Returns a buffer for a bucket: one that is free, or a new one, which later buckets can use, too."""
        buffer = torch.empty(0, dtype=place.params[0].dtype, device="cpu")
        kept = not place.in_place and place.nbytes <= self._kept_bytes
        if self._free and kept:
            storage = self._free.pop()
        else:
            self._free.clear()  # or there would be more than `LIVE`
            storage = torch.UntypedStorage(self._kept_bytes if kept else place.nbytes, device="cpu")  # type: ignore[no-untyped-call]
        buffer.set_(storage, 0, (place.elements,))  # type: ignore[call-overload]
        return buffer
