"""`Reducer`: adds gradients over the ranks, bucket by bucket, while backward is still running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.bucket_noise import BucketNoise
from hvd_adam.distributed.gradients.compression import AllReduce, Reduction, Scaling, is_half, start_reduction
from hvd_adam.distributed.gradients.grad_scaling import element_sum
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.distributed.wire.coded_allreduce import exact_name
from hvd_adam.distributed.wire.error_feedback import ErrorFeedback

# Gradients are reduced in fixed buckets, so that sums do not depend on timing. Large enough to use the network's
# bandwidth, small enough that the first reduction starts while backward is still running.
BUCKET_BYTES = 8 * 2**20

_LAST = 0  # the bucket of the first parameters: backward completes it last, and it carries the message


class Reduced(NamedTuple):
    """The result of one round of reductions.

    Attributes:
        message: the sum of the messages of all ranks.
        total: 0-dimensional float64, or None: 0 if all elements of the gradients are finite, else NaN, and that
            on all ranks or on none.
    """

    message: list[float]
    total: Tensor | None


class Reducer:
    """The buckets of flat gradients, and one round of reductions: every bucket once.

    Every rank multiplies its gradients by `scale` on their way into the bucket, so that their sum over the ranks
    is the mean; of half-precision gradients the sum is multiplied, in float32.
    Next to its gradients a bucket has one flag per parameter, 1 if this rank has a gradient. The sum
    of the flags shows all ranks which parameters no rank has used, without another message.

    Attributes:
        scale, scatters: as the arguments `scale` and `scatter`.

    Args:
        buffers: identical on all ranks, at least one, with `control` elements reserved for the message and
            what `noise` sends.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other reducer.
        compression: as in `start_reduction`.
        scale: factor that makes the mean of a sum over ranks and micro-batches.
        scatter: reduce each shard of a bucket to its owner only; flags and message are then reduced separately.
        feedback: residuals of gradients that are, or may be, sent as codes; else None.
        lossless: use the compression only for gradients that it does not round: bf16 for those of bfloat16.
        noise: measures the noise scale.
    """

    def __init__(
        self,
        buffers: Sequence[GradientBuffer],
        prefix: str,
        compression: str,
        scale: float,
        scatter: bool = False,
        feedback: ErrorFeedback | None = None,
        *,
        lossless: bool = False,
        noise: NoiseMeter,
    ) -> None:
        self._buffers = buffers
        self._buckets = [(buffer, bucket) for buffer in buffers for bucket in buffer.layout.buckets]
        self._number = {
            p: number
            for number, (buffer, bucket) in enumerate(self._buckets)
            for p in buffer.params[bucket.first : bucket.last]
        }
        self._index = {p: i for buffer in buffers for i, p in enumerate(buffer.params)}
        self._prefix, self._compression, self.scale = prefix, compression, scale
        self.scatters, self._residuals, self._lossless = scatter, feedback, lossless
        self._noise = BucketNoise(noise, self._buckets, _LAST)
        self._in_flight: dict[int, Reduction] = {}

    @property
    def parameters(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each bucket."""
        return [tuple(buffer.params[bucket.first : bucket.last]) for buffer, bucket in self._buckets]

    @property
    def in_flight(self) -> bool:
        """Whether a round has begun."""
        return bool(self._in_flight)

    @property
    def _feedback(self) -> ErrorFeedback | None:
        """The residuals, if there are any."""
        return self._residuals if self._residuals is not None and self._residuals.in_use else None

    @property
    def _codes(self) -> ErrorFeedback | None:
        """The residuals, if gradients are sent as codes."""
        return self._residuals if self._residuals is not None and self._residuals.sends_codes else None

    def _compression_of(self, buffer: GradientBuffer) -> str:
        return "none" if self._lossless and buffer.dtype != torch.bfloat16 else self._compression

    def pass_begins(self) -> None:
        """Called before a backward pass that begins a round: a loop may have cleared gradients itself."""
        if self._feedback is not None:
            self._feedback.forget_unless_kept(self._index)

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

    def sent(self, p: Tensor) -> bool:
        """Returns whether the bucket of `p` has been sent in this round, so that its gradient must not change."""
        return self._number.get(p) in self._in_flight

    def send(self, p: Tensor) -> None:
        """Starts to reduce the bucket that contains `p`, unless it waits for the message; see `finish`."""
        if self._number[p] != _LAST:
            self._send(self._number[p])

    def _send(self, number: int) -> None:
        buffer, bucket = self._buckets[number]
        later = is_half(buffer.dtype) or self._codes is not None  # multiplied in float32, after a conversion
        present = buffer.collect(bucket.first, bucket.last, 1.0 if later else self.scale)
        for i, has_grad in enumerate(present, start=bucket.first):
            if not has_grad:
                buffer.clear(i)
        _flags(buffer, bucket).copy_(torch.tensor(present, device="cpu"))
        self._noise.measure_own(number, self.scale if later else 1.0, is_first=not self._in_flight)
        scaling = Scaling(self.scale, bucket.flags - bucket.start) if later else Scaling()
        if self._feedback is not None and self._codes is None:  # of another compression before
            for i in range(bucket.first, bucket.last):
                self._feedback.add_waiting(buffer.params[i], buffer.grad_view(i), scaling.factor)
        gradients, name = buffer.grad[bucket.start : bucket.end], f"{self._prefix}.{number}"
        with explained():
            if self._codes is None:
                compression = self._compression_of(buffer)
                reduction = start_reduction(gradients, name, compression, self.scatters, scaling)
            else:
                reduction = self._codes.start(number, gradients, name, scaling)
        self._in_flight[number] = reduction

    def send_rest(self, message: Tensor) -> None:
        """Sends the remaining buckets, and with the last one the message.

        Args:
            message: at most as many elements as are reserved for it.
        """
        buffer, bucket = self._buckets[_LAST]
        _message(buffer, bucket, len(message)).copy_(message)
        for number in reversed(range(len(self._buckets))):
            if number not in self._in_flight:
                self._send(number)

    def finish(self, message: Tensor, *, add: bool = False) -> Reduced:
        """Waits for all buckets, which have been sent. Sets gradients that no rank has to None.

        Args:
            message: as sent.
            add: also look for infinite elements, in each bucket as soon as it arrives, while it is in cache and
                others are in flight.

        Raises:
            HorovodInternalError: another rank has ended, or is in another collective.
        """
        add = add or self._feedback is not None
        with explained():
            for reduction in self._in_flight.values():
                reduction.start_gather()
            sums = []
            for number, reduction in self._in_flight.items():
                reduction.wait()
                if add:
                    buffer, bucket = self._buckets[number]
                    sums.append(element_sum(self._own(buffer.grad, bucket)))
                self._noise.measure_mean(number, *self._own_span(self._buckets[number][1]))
            self._in_flight.clear()
            reduced = self._read(len(message), torch.stack(sums).mul(0).sum() if add else None)
        if self._feedback is not None and reduced.total is not None:
            self._feedback.finish(reduced.total)
        return reduced

    def start_meeting(self, call: str) -> Callable[[], None]:
        """Makes ranks that reduce gradients fail, instead of waiting for this one for ever, and this one too.

        It reduces one element under the name of the last bucket: Horovod refuses tensors of different shapes. It
        does nothing where gradients are scattered or sent as bfloat16, by other collectives. Codes always travel
        with an all-reduce.

        Args:
            call: what this rank does, and every rank must, for the error.

        Returns:
            Waits until all ranks have called this.
        """
        first = self._buckets[_LAST][0]
        if self._codes is None and (self.scatters or self._compression_of(first) == "bf16"):
            return lambda: None
        one = torch.zeros(1, dtype=torch.float32, device=first.device)
        name = f"{self._prefix}.{_LAST}"
        meeting = AllReduce(one, name if self._codes is None else exact_name(name), "none")

        def wait() -> None:
            with explained(call):
                meeting.wait()

        return wait

    def place(self, p: Tensor) -> Tensor:
        """Returns the view of the buffer that holds the averaged gradient of `p`."""
        buffer, _ = self._buckets[self._number[p]]
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

    def _own(self, gradients: Tensor, bucket: Bucket) -> Tensor:
        """Returns the gradients of a bucket that this rank has the sum of."""
        start, end = self._own_span(bucket)
        return gradients[start:end]

    def _own_span(self, bucket: Bucket) -> tuple[int, int]:
        return bucket.shard(horovod().rank(), horovod().size()) if self.scatters else (bucket.start, bucket.end)

    def _read(self, length: int, total: Tensor | None) -> Reduced:
        """Reads flags and message of all ranks, and drops the gradients that no rank has."""
        first_buffer, first_bucket = self._buckets[_LAST]
        place = _message(first_buffer, first_bucket, length)
        flags = [_flags(buffer, bucket) for buffer, bucket in self._buckets]
        small = torch.cat([values.float() for values in (*flags, place)]).cpu()
        numbers = self._noise.numbers(own=self.scatters)
        if self.scatters:  # with codes, flags and message have been sent exactly, to all ranks
            head = [] if self._codes is not None else [small]
            rest = [] if total is None else [total.float().cpu().reshape(1)]  # 0 or NaN
            sent = torch.cat([*head, numbers, *rest])
            sums = horovod().allreduce(sent, op=horovod().Sum, name=f"{self._prefix}.used")
            if total is not None:
                total, sums = sums[-1].double(), sums[:-1]
            *head, numbers = torch.split(sums, [*map(len, head), len(numbers)])
            small = head[0] if head else small
        self._noise.receive(numbers)
        *used, received = torch.split(small, [*map(len, flags), length])
        for (buffer, bucket), counts in zip(self._buckets, used, strict=True):
            for p, ranks in zip(buffer.params[bucket.first : bucket.last], counts.tolist(), strict=True):
                if ranks == 0:
                    if self._feedback is not None:
                        self._feedback.take_back(self._number[p], p, self.place(p))
                    p.grad = None
        for values in (*flags, place):
            values.zero_()
        return Reduced(received.tolist(), total)


@contextmanager
def explained(call: str | None = None) -> Iterator[None]:
    """Replaces Horovod's message about ranks that do not take part in a collective by what it means here.

    Args:
        call: what this rank does while others may wait for gradients; None if it waits for gradients itself.
    """
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except HorovodInternalError as error:
        if call is not None:
            raise HorovodInternalError(
                f"this rank is in {call}, which every rank must call in the same place, while another waits for "
                "gradients, or has ended or failed. If that rank has shown another error, that is the cause. "
                f"(Horovod: {error})"
            ) from error
        raise HorovodInternalError(
            "some ranks wait for gradients, while another has ended, failed, called something else that every "
            "rank must call (broadcast, add_param_group, state_dict if sharded) or hvd.join(), or trains other "
            "parameters (freeze and unfreeze on every rank). If that rank has shown an error, that is the cause. "
            "If ranks have different numbers of batches, use `with optimizer.join():` around the loop. "
            f"(Horovod: {error})"
        ) from error


def _flags(buffer: GradientBuffer, bucket: Bucket) -> Tensor:
    return buffer.grad[bucket.flags : bucket.flags + bucket.last - bucket.first]


def _message(buffer: GradientBuffer, bucket: Bucket, length: int) -> Tensor:
    return buffer.grad[bucket.control : bucket.control + length]
