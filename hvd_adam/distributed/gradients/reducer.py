"""`Reducer`: adds gradients over the ranks, bucket by bucket, while backward is still running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.started import Pipeline
from hvd_adam.distributed.collectives.waiting import working_meanwhile
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.buckets import Buckets
from hvd_adam.distributed.gradients.compression import Reduction, Scaling, is_half, start_reduction
from hvd_adam.distributed.gradients.flags import Reduced, finite_or_nan, flags_of, message_of, read_flags
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.gradients.header import Header, square_of, sums_are_finite
from hvd_adam.distributed.gradients.missing_ranks import arrivals, explained, start_meeting
from hvd_adam.distributed.noise.buckets import BucketNoise
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.distributed.wire.coded_allreduce import CodedAllReduce, exact_name, sum_of
from hvd_adam.distributed.wire.error_feedback import ErrorFeedback
from hvd_adam.optim.update_rows import Arrival

_LAST = 0  # the bucket of the first parameters: backward completes it last, and it carries the message


class Reducer(Buckets):
    """One round of reductions of the buckets of flat gradients: every bucket once.

    Every rank multiplies its gradients by `scale` on their way into the bucket, so that their sum over the ranks
    is the mean; of half-precision gradients the sum is multiplied, in float32.
    Next to its gradients a bucket has one flag per parameter, 1 if this rank has a gradient. The sum
    of the flags shows all ranks which parameters no rank has used, without another message.

    Attributes:
        sections: whether buckets may be used as they arrive, with a compression that is no codes.

    Args:
        buffers: identical on all ranks, at least one, with `control` elements reserved for the message and
            what `noise` sends.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other reducer.
        compression: as in `start_reduction`.
        scale: factor that makes the mean of a sum over ranks and micro-batches.
        scatter: reduce each shard of a bucket to its owner only.
        feedback: residuals of gradients that are, or may be, sent as codes; else None.
        lossless: use the compression only for gradients that it does not round: bf16 for those of bfloat16.
        ahead: send a `Header` ahead of the last bucket, instead of the message within it; then buckets can be used
            as they arrive, see `arrive`. Not next to codes: waiting for all of them has been as fast, or faster.
            Where no bucket is all-reduced, one is sent in any case.
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
        ahead: bool = False,
        noise: NoiseMeter,
    ) -> None:
        super().__init__(buffers, scale, scatter)
        self._prefix, self._compression, self._residuals = prefix, compression, feedback
        self._lossless, self.sections = lossless, ahead
        self._noise = BucketNoise(noise, self._buckets, _LAST, scatter)
        self._in_flight: dict[int, Reduction] = {}
        self._pipeline = Pipeline()  # of those in flight
        self._elsewhere: dict[int, dict[Tensor, Tensor]] = {}  # by bucket: gradients that are not in it yet
        # By bucket: for each parameter whether this rank has a gradient in this round.
        self._present: dict[int, list[bool]] = {}
        self._sums_are_finite = True  # if those of all ranks are as small as this rank's in this round
        self._header: Header | None = None  # of this round, once sent

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

    @property
    def ahead(self) -> bool:
        """Whether buckets are used as they arrive, in rounds with the compression that is in use."""
        return self.sections and self._codes is None

    def _compression_of(self, buffer: GradientBuffer) -> str:
        return "none" if self._lossless and buffer.dtype != torch.bfloat16 else self._compression

    def pass_begins(self) -> None:
        """Called before a backward pass that begins a round: a loop may have cleared gradients itself."""
        if self._feedback is not None:
            self._feedback.forget_unless_kept(self._index)

    def sent(self, p: Tensor) -> bool:
        """Returns whether the bucket of `p` has been sent in this round, so that its gradient must not change."""
        return self.number.get(p) in self._in_flight

    def send(self, p: Tensor) -> None:
        """Starts to reduce the bucket that contains `p`, unless it waits for the message; see `finish`."""
        number = self.number[p]
        if number != _LAST:
            self._start(number, self._collect(number))

    def _collect(self, number: int) -> Scaling:
        """Makes a bucket ready to be sent. Returns the factor to send it with."""
        buffer, bucket = self._buckets[number]
        later = is_half(buffer.dtype) or self._codes is not None  # multiplied in float32, after a conversion
        coded = () if self._codes is None else self._codes.coded(number)
        if coded and not self._noise.due:
            self._elsewhere[number] = buffer.take_elsewhere(coded)
        present = buffer.collect(bucket.first, bucket.last, 1.0 if later else self.scale)
        for i, has_grad in enumerate(present, start=bucket.first):
            if not has_grad:
                buffer.clear(i)
        first = not self._present
        self._present[number] = present
        flags_of(buffer, bucket).copy_(torch.tensor(present, device="cpu"))
        square = self._square(number) if self._feedback is None else None  # residuals are added later
        rest = self.scale if later else 1.0
        self._noise.measure_own(number, rest, square, is_first=first, has_gradient=any(present))
        scaling = Scaling(self.scale, bucket.flags - bucket.start) if later else Scaling()
        if self._feedback is not None and self._codes is None:  # of another compression before
            for i in range(bucket.first, bucket.last):
                self._feedback.add_waiting(buffer.params[i], buffer.grad_view(i), scaling.factor)
            square = self._square(number)
        if square is not None:
            compression = self._compression_of(buffer)
            self._sums_are_finite = sums_are_finite(square, compression, horovod().size(), buffer.dtype)
        return scaling

    def _square(self, number: int) -> Tensor | None:
        """Returns the squared 2-norm of a bucket; None where no header tells whether the sums are finite."""
        if not (self.ahead and self._sums_are_finite):
            return None
        buffer, bucket = self._buckets[number]
        return square_of(buffer.grad[bucket.start : bucket.flags])

    def _start(self, number: int, scaling: Scaling) -> None:
        buffer, bucket = self._buckets[number]
        gradients, name = buffer.grad[bucket.start : bucket.end], f"{self._prefix}.{number}"
        compression = self._compression_of(buffer)
        with explained():
            self._pipeline.advance()
            reduction: Reduction
            if self._codes is None:
                reduction = start_reduction(gradients, name, compression, self.scatters, scaling)
            else:
                rest = self._elsewhere.pop(number, {}), self._pipeline.advance
                reduction = self._codes.start(number, gradients, name, scaling, *rest)
        self._in_flight[number] = reduction
        self._pipeline.add(reduction)

    def _arrivals(self, number: int) -> Iterator[tuple[int, int]]:
        """Waits for the sum of a bucket, part after part, and advances others meanwhile.

        Yields:
            (start, end) of the elements of the buffer whose sums are there; of this rank's shard if scattered.
        """
        (_, bucket), reduction = self._buckets[number], self._in_flight[number]
        start = bucket.start
        for arrived in arrivals(reduction, bucket.end - bucket.start, meanwhile=self._pipeline.advance):
            end = bucket.start + arrived
            if end == bucket.end:
                self._noise.measure_mean(number)
            elif self._noise.waits:
                continue
            yield self._own_span(bucket) if self.scatters else (start, end)
            start = end

    def send_rest(self, message: Tensor) -> None:
        """Sends the remaining buckets, and with the last one the message.

        Args:
            message: at most as many elements as are reserved for it.
        """
        rest = [number for number in reversed(range(len(self._buckets))) if number not in self._in_flight]
        scalings = [self._collect(number) for number in rest]
        if self._sends_header:
            present = [self._present[number] for number in range(len(self._buckets))]
            safe = self._sums_are_finite
            self._header = Header(self._name_of_message, message, present, sums_are_finite=safe)
        else:
            message_of(*self._buckets[_LAST], len(message)).copy_(message)
        for number, scaling in zip(rest, scalings, strict=True):
            self._start(number, scaling)

    def pass_ends(self) -> None:
        """Called where user code may change gradients that it holds, and the round is in flight."""
        for reduction in self._in_flight.values():
            if isinstance(reduction, CodedAllReduce):
                reduction.copy_own()

    @property
    def _sends_header(self) -> bool:
        """Whether the message has an all-reduce of its own. Otherwise it is part of one, also next to codes."""
        buffer, _ = self._buckets[_LAST]
        return self._codes is None and (self.sections or self.scatters or self._compression_of(buffer) == "bf16")

    @property
    def _name_of_message(self) -> str:
        """Name of the all-reduce that the message is part of."""
        if self._sends_header:
            return f"{self._prefix}.header"
        name = f"{self._prefix}.{_LAST}"
        return name if self._codes is None else exact_name(name)

    def header(self) -> Header:
        """Waits for the header of this round, which has been sent; raises what `finish` does."""
        assert self._header is not None
        with explained(), working_meanwhile(self._pipeline.advance):
            self._header.wait()
        return self._header

    def arrive(self) -> Iterator[Arrival]:
        """Waits for one bucket after the other, and yields the parts of each as their sums arrive.

        In place of `finish`, with the header of this round, by which all sums are finite. Sets gradients of the
        bucket that no rank has to None. Raises what `finish` does.
        """
        header = self.header()
        for number in self._in_flight:
            bucket, is_used = self._buckets[number][1], header.used[number]
            for start, end in self._arrivals(number):
                if start == bucket.start or self.scatters:
                    self._drop_unused(number, is_used)
                in_parts = (start, end) != self._own_span(bucket)
                yield number, self.elements(number, start, end) if in_parts else None
            flags_of(*self._buckets[number]).zero_()
        self._read_noise()
        self._end_round()
        if self._feedback is not None:
            self._feedback.finish(torch.zeros((), device="cpu"))

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
        if self._sends_header:
            self.header()
        sums = []
        for number in self._in_flight:
            for start, end in self._arrivals(number):
                if add:
                    sums.append(sum_of(self._in_flight[number], self._buckets[number][0].grad[start:end]))
        with explained():
            reduced = self._read(len(message), torch.stack(sums).mul(0).sum() if add else None)
        self._end_round()
        if self._feedback is not None and reduced.total is not None:
            self._feedback.finish(reduced.total)
        return reduced

    def start_meeting(self, call: str) -> Callable[[], None]:
        """As `missing_ranks.start_meeting`, in place of the message of a round."""
        device = torch.device("cpu") if self._sends_header else self._buckets[_LAST][0].device
        return start_meeting(self._name_of_message, device, call)

    def _read(self, length: int, total: Tensor | None) -> Reduced:
        """Reads flags and message of all ranks, and drops the gradients that no rank has."""
        if self._header is None:
            used, message = read_flags(self._buckets, length)
        else:
            used, message = self._header.used, self._header.message
        if self.scatters and total is not None:
            total = self._of_all_ranks(finite_or_nan(total))[0].double()
        self._read_noise()
        for number, is_used in enumerate(used):
            self._drop_unused(number, is_used)
            flags_of(*self._buckets[number]).zero_()
        return Reduced(message, total)

    def _read_noise(self) -> None:
        numbers = self._noise.numbers()
        if len(numbers):
            self._noise.receive(self._of_all_ranks(numbers) if self._noise.in_parts else numbers)

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        hvd = horovod()
        total: Tensor = hvd.allreduce(values, op=hvd.Sum, name=f"{self._prefix}.used")
        return total

    def _drop_unused(self, number: int, used: Sequence[bool]) -> None:
        """Sets the gradients of a bucket that no rank has to None."""
        buffer, bucket = self._buckets[number]
        for p, is_used in zip(buffer.params[bucket.first : bucket.last], used, strict=True):
            if not is_used:
                if self._feedback is not None:
                    self._feedback.take_back(number, p, self.place(p))
                p.grad = None

    def _end_round(self) -> None:
        self._in_flight.clear()
        self._present.clear()
        self._pipeline.clear()
        self._header, self._sums_are_finite = None, True
