"""`MasterShard`: this rank's shard of the parameters of one bucket, before codes have rounded it for all ranks."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import Codec
from hvd_adam.distributed.wire.coded_bucket import Place
from hvd_adam.distributed.wire.fused_codec import functions
from hvd_adam.optim.memory import memory_order, zeros

Pieces = list[tuple[Tensor, Tensor]]  # 1-dimensional views of parameters, and their places in another tensor


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
        self._codec, self._functions = codec, functions(codec, buffer.device.type)
        self.buffer, self.bucket, self.coded = buffer, bucket, coded
        self._exact = {p for p in buffer.params[bucket.first : bucket.last] if p not in coded}
        self._moving: set[Tensor] = set()
        self._shard, self._ranks = bucket.shard(rank, ranks), ranks
        elements = self._shard[1] - self._shard[0]
        self.master = zeros(elements, torch.float32, buffer.device)
        self._sent = zeros(elements, torch.float32, buffer.device)  # the parameters, when they were last the same
        self.start_over()

    def _own(self, other: Tensor, among: Container[Tensor] | None = None) -> Pieces:
        """Returns this rank's pieces of parameters, with their places in a tensor of the shard's length."""
        pieces = self.buffer.pieces(self.bucket, *self._shard, among=among)
        return [(piece, other[place : place + len(piece)]) for piece, place in pieces]

    def start_over(self) -> None:
        """Makes the parameters the masters."""
        _copy(self._own(self._sent), to_parameters=False)
        self.master.copy_(self._sent)

    def notice_changes(self) -> None:
        """Makes parameters that something else than an update has changed, bit by bit, the masters."""
        now = torch.zeros_like(self._sent)
        _copy(self._own(now), to_parameters=False)
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
        """Makes the masters the parameters, until `end_update`."""
        self.notice_changes()
        self._moving = {p for p in self.coded if p.grad is not None}
        _copy(self._own(self.master), to_parameters=True)

    def end_update(self) -> None:
        """Makes the parameters the masters, and what they were before the parameters."""
        _copy(self._own(self.master), to_parameters=False)
        _copy(self._own(self._sent), to_parameters=True)

    def encode(self) -> Tensor:
        """Returns the codes and scales of the change of this rank's shard, uint8.

        Parameters without a gradient do not change.
        """
        change, unused = torch.zeros_like(self.master), torch.zeros_like(self.master)
        for (_, target), (_, master), (_, sent) in zip(
            *(self._own(other, self._moving) for other in (change, self.master, self._sent)), strict=True
        ):
            torch.sub(master, sent, out=target)
        size = self._codec.payload_bytes(len(change))
        payload = torch.empty(1, size, dtype=torch.uint8, device=change.device)
        self._functions.encode(self._codec, change, unused, unused, payload, 1.0, 1.0)
        return payload.view(-1)

    def own_exact(self) -> list[Tensor]:
        """Returns this rank's pieces of what is sent exactly."""
        return [master for _, master in self._own(self.master, self._exact)]

    def exact_of(self, rank: int) -> list[Tensor]:
        """Returns the parameters' pieces that `own_exact` of a rank is for."""
        shard = self.bucket.shard(rank, self._ranks)
        return [piece for piece, _ in self.buffer.pieces(self.bucket, *shard, among=self._exact)]

    def add(self, payloads: Tensor) -> None:
        """Adds the decoded changes of all shards to the parameters: the same on all ranks.

        Args:
            payloads: of all ranks, in order.
        """
        bucket = self.bucket
        changes = torch.empty(bucket.end - bucket.start, dtype=torch.float32, device=payloads.device)
        self._functions.decode(self._codec, payloads.view(self._ranks, -1), changes)
        pieces = list(self.buffer.pieces(bucket, bucket.start, bucket.end, among=self._moving))
        if pieces:
            changed = [changes[place : place + len(piece)] for piece, place in pieces]
            torch._foreach_add_([piece for piece, _ in pieces], changed)

    def remember(self) -> None:
        """Called when the parameters are the same on all ranks again."""
        _copy(self._own(self._sent), to_parameters=False)


def _copy(pieces: Pieces, *, to_parameters: bool) -> None:
    if pieces:
        parameters, others = map(list, zip(*pieces, strict=True))
        torch._foreach_copy_(*((parameters, others) if to_parameters else (others, parameters)))
