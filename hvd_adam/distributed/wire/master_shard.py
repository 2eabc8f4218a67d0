"""`MasterShard`: this rank's shard of the parameters of one bucket, before codes have rounded it for all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import Codec
from hvd_adam.distributed.wire.coded_bucket import Place
from hvd_adam.distributed.wire.fused_codec import functions
from hvd_adam.optim.memory import memory_order, zeros


class Span(NamedTuple):
    """Elements of a parameter, in the order of its memory.

    Attributes:
        p: the parameter.
        skip: index of the first one.
        length: their number.
        place: index of the first one in a bucket or a shard.
    """

    p: Tensor
    skip: int
    length: int
    place: int

    def elements(self) -> Tensor:
        """Returns a view of them."""
        return memory_order(self.p.detach(), self.skip, self.length)

    def of(self, other: Tensor) -> Tensor:
        """Returns their place in a tensor of the bucket's, or the shard's, length."""
        return other[self.place : self.place + self.length]


def spans(buffer: GradientBuffer, bucket: Bucket, start: int, end: int, among: Collection[Tensor]) -> list[Span]:
    """Returns the elements of some parameters that correspond to a part of a bucket.

    Args:
        buffer: the buffer of the gradients.
        bucket: of its layout.
        start: first element of the part, as an index into the buffer.
        end: element after its last one.
        among: the parameters.
    """
    found = []
    for i in range(bucket.first, bucket.last):
        p, offset = buffer.params[i], buffer.layout.offsets[i]
        a, b = max(offset, start), min(offset + p.numel(), end)
        if a < b and p in among:
            found.append(Span(p, a - offset, b - a, a - start))
    return found


class MasterShard:
    """The masters of a shard: float32 parameters that this rank updates, and sends the codes of their change.

    The parameters themselves are the same on all ranks: the sum of what has been sent. A master differs from its
    parameter by what the codes of its last change have missed, which is sent with the next change.

    Args:
        codec: the format.
        buffer: the buffer of the gradients that the bucket is part of; float32.
        bucket: the bucket, whose shards are whole blocks.
        coded: the parameters that are sent as codes, with their places; the others are sent exactly.
        rank, ranks: of this process.

    Attributes:
        buffer, bucket, coded: as the arguments.
        master: of this rank's shard; float32.
    """

    def __init__(
        self,
        codec: Codec,
        buffer: GradientBuffer,
        bucket: Bucket,
        coded: Mapping[Tensor, Place],
        rank: int,
        ranks: int,
    ) -> None:
        self.buffer, self.bucket, self.coded = buffer, bucket, coded
        self.use(codec)
        params = buffer.params[bucket.first : bucket.last]
        exact = {p for p in params if p not in coded}
        start, end = self._shard = bucket.shard(rank, ranks)
        self._own = spans(buffer, bucket, start, end, set(params))
        self._coded = spans(buffer, bucket, bucket.start, bucket.end, coded.keys())
        self._exact = [spans(buffer, bucket, *bucket.shard(other, ranks), exact) for other in range(ranks)]
        self._rank, self._ranks = rank, ranks
        self._moving: set[Tensor] = set()
        elements = end - start
        self.master = zeros(elements, torch.float32, buffer.device)
        self._sent = zeros(elements, torch.float32, buffer.device)  # the parameters, when they were last the same
        self.start_over()

    def use(self, codec: Codec) -> None:
        """Encodes in this format from now on; shards are whole blocks of it."""
        self._codec, self._functions = codec, functions(codec, self.buffer.device.type)

    def _read(self, target: Tensor) -> None:
        """Copies this rank's shard of the parameters."""
        if self._own:
            torch._foreach_copy_([span.of(target) for span in self._own], [span.elements() for span in self._own])

    def _write(self, source: Tensor) -> None:
        """Replaces this rank's shard of the parameters."""
        if self._own:
            torch._foreach_copy_([span.elements() for span in self._own], [span.of(source) for span in self._own])

    def write_masters(self) -> None:
        """Copies the masters into the parameters of this rank's shard."""
        self._write(self.master)

    def start_over(self) -> None:
        """Copies the parameters into the masters."""
        self._read(self._sent)
        self.master.copy_(self._sent)

    def notice_changes(self) -> None:
        """Copies elements of parameters that something else than an update has changed into the masters."""
        now = torch.zeros_like(self._sent)
        self._read(now)
        found, before = now.view(torch.int32), self._sent.view(torch.int32)
        if not torch.equal(found, before):
            self.master.copy_(torch.where(found == before, self.master, now))
            self._sent.copy_(now)

    def put(self, p: Tensor, whole: Tensor) -> None:
        """Replaces the masters of a parameter.

        Args:
            p: the parameter; coded.
            whole: of its shape.
        """
        offset, first = self.bucket.start + self.coded[p][0], self._shard[0]
        start, end = max(offset, first), min(offset + p.numel(), self._shard[1])
        if start < end:
            values = memory_order(torch.empty_like(p).copy_(whole), start - offset, end - start)
            self.master[start - first : end - first] = values

    # An update.

    def begin_update(self) -> None:
        """Copies the masters into the parameters, until `end_update`."""
        self.notice_changes()
        self._moving = {p for p in self.coded if p.grad is not None}
        self._write(self.master)

    def end_update(self) -> None:
        """Copies the updated parameters into the masters, and restores the parameters."""
        self._read(self.master)
        self._write(self._sent)

    def encode(self) -> Tensor:
        """Returns the codes and scales of the change of this rank's shard, uint8.

        Parameters without a gradient do not change.
        """
        change, unused = torch.zeros_like(self.master), torch.zeros_like(self.master)
        for span in self._own:
            if span.p in self._moving:
                torch.sub(span.of(self.master), span.of(self._sent), out=span.of(change))
        size = self._codec.payload_bytes(len(change))
        payload = torch.empty(1, size, dtype=torch.uint8, device=change.device)
        self._functions.encode(self._codec, change, unused, unused, payload, 1.0, 1.0)
        return payload.view(-1)

    def own_exact(self) -> list[Tensor]:
        """Returns this rank's pieces of what is sent exactly."""
        return [span.of(self.master) for span in self._exact[self._rank]]

    def exact_of(self, rank: int) -> list[Tensor]:
        """Returns the parameters' pieces that `own_exact` of a rank is for."""
        return [span.elements() for span in self._exact[rank]]

    def add(self, payloads: Tensor) -> None:
        """Adds the decoded changes of all shards to the parameters: the same on all ranks.

        Args:
            payloads: of all ranks, in order.
        """
        changes = torch.empty(self.bucket.end - self.bucket.start, dtype=torch.float32, device=payloads.device)
        self._functions.decode(self._codec, payloads.view(self._ranks, -1), changes)
        moving = [span for span in self._coded if span.p in self._moving]
        if moving:
            torch._foreach_add_([span.elements() for span in moving], [span.of(changes) for span in moving])

    def remember(self) -> None:
        """Called when the parameters are the same on all ranks again."""
        self._read(self._sent)
