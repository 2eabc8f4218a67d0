"""`CodedBucket`: what one bucket of gradients needs to be sent as codes, first of all its residuals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import columns
from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import Codec, unrotate
from hvd_adam.distributed.wire.fused_codec import functions
from hvd_adam.optim.memory import zeros

Place = tuple[int, list[int], list[int]]  # offset in the bucket, shape and strides of a parameter


class Residual:
    """What codes have missed so far.

    The rounding errors of reductions since the last update are kept as pending. `commit` adopts them when the
    update is made; `roll_back` discards them.

    Args:
        elements: its length.
        device: of the gradients.

    Attributes:
        committed: as of the last update; float32.
        is_pending: whether there have been reductions since.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.committed = zeros(elements, torch.float32, device)
        self._pending = zeros(elements, torch.float32, device)
        self.is_pending = False

    @property
    def latest(self) -> Tensor:
        """With the reductions since the last update."""
        return self._pending if self.is_pending else self.committed

    def advance(self) -> tuple[Tensor, Tensor]:
        """Returns the residual for a reduction, and where to put the new one. They may be the same memory."""
        before, self.is_pending = self.latest, True
        return before, self._pending

    def reset(self) -> None:
        """Makes it 0."""
        self.is_pending = False
        self.committed.zero_()

    def commit(self) -> None:
        """Called when an update has been made."""
        if self.is_pending:
            self.committed, self._pending = self._pending, self.committed
        self.is_pending = False

    def roll_back(self) -> None:
        """Called when what has been reduced since the last update is dropped."""
        self.is_pending = False


class WorkerResidual(Residual):
    """Of what a rank sends of its gradients. It adds the part of its own rank itself, and misses nothing of that.

    What is put there, such as the residual of another rank that has left, is owed: added to the next sum.

    Args:
        elements, device: as in `Residual`.
        own: the elements of the own part.
    """

    def __init__(self, elements: int, device: torch.device, own: slice) -> None:
        super().__init__(elements, device)
        self._own, self._owes = own, [False, False]  # whether the own part may differ from 0: committed, pending

    def changed(self) -> None:
        """Called when something was put into what is the latest."""
        self._owes[self.is_pending] = True

    def advance_owing(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns what `advance` does, whose own parts are not used, and what is owed, if anything."""
        owed = self.latest[self._own].clone() if self._owes[self.is_pending] else None
        before, after = self.advance()
        if self._owes[True]:
            after[self._own] = 0.0
            self._owes[True] = False
        return before, after, owed

    def reset(self) -> None:
        """As `Residual.reset`."""
        super().reset()
        self._owes[False] = False

    def commit(self) -> None:
        """As `Residual.commit`."""
        if self.is_pending:
            self._owes.reverse()
        super().commit()


class Piece(NamedTuple):
    """What is sent at a time: the same elements of each rank's part of a bucket.

    Attributes:
        start, end: its elements, as indices into a part.
        codes: [ranks, bytes], uint8: memory for the codes of all parts.
        total: [bytes], uint8: memory for the codes of the sum; empty if the bucket is scattered.
    """

    start: int
    end: int
    codes: Tensor
    total: Tensor


class CodedBucket:
    """Residuals and memory of a bucket that is sent as codes.

    Coded are all elements up to the flags; of a scattered bucket all, so that shards are equal. Those of some
    parameters are sent exactly instead, and are zeros in the codes.

    Args:
        codec: the format.
        buffer: the buffer that the bucket is part of.
        bucket: the bucket.
        exact: parameters that are sent exactly.
        rank, ranks: of this process.
        scatter: each rank gets the sum of its shard only, and there are no codes of the sum.

    Attributes:
        codec: the format.
        functions: what encodes and decodes it on this device.
        params: the coded ones, with their places.
        elements: number of coded elements.
        worker: residual of what this rank sends of its gradients, padded to equal parts for all ranks.
        server: residual of the sum of one part, which this rank sends; rotated if the codes are. Empty if
            scattered.
        pieces: what is sent one after the other.
        exact_spans: (start, end) of what is sent exactly; the last one is of flags and message.
        zero_spans: (start, end) between the coded parameters, where codes leave their errors.
        unit: units of the gradients per unit of the residuals, in the round that is in flight.
    """

    unit = 1.0

    def __init__(
        self,
        codec: Codec,
        buffer: GradientBuffer,
        bucket: Bucket,
        exact: Collection[Tensor],
        rank: int,
        ranks: int,
        *,
        scatter: bool = False,
    ) -> None:
        self.codec, self.rank = codec, rank
        self.functions = functions(codec, buffer.device.type)
        places = {buffer.params[i]: _place(buffer, bucket, i) for i in range(bucket.first, bucket.last)}
        self.params = {p: place for p, place in places.items() if p not in exact}
        flags = bucket.flags - bucket.start
        self.elements = bucket.end - bucket.start if scatter else flags
        step = ranks * codec.block
        padded = -(-self.elements // step) * step
        self._part, self._ranks = padded // ranks, ranks
        self.worker = WorkerResidual(padded, buffer.device, slice(rank * self._part, (rank + 1) * self._part))
        self.server = Residual(0 if scatter else self._part, buffer.device)
        self.pieces = list(self._divided(buffer.device, scatter))
        sent = [(place[0], place[0] + p.numel()) for p, place in places.items() if p in exact]
        self.exact_spans = [*sent, (flags, bucket.used - bucket.start)]
        self.zero_spans = list(_gaps(self.params, self.elements))

    def _divided(self, device: torch.device, scatter: bool) -> Iterator[Piece]:
        for start, end in columns(self._part, self._ranks, device, self.codec.block):
            size = self.codec.payload_bytes(end - start)
            codes = torch.empty(self._ranks, size, dtype=torch.uint8, device=device)
            yield Piece(start, end, codes, codes.new_empty(0 if scatter else size))

    def runs(self, piece: Piece, ranks: range | None = None) -> Iterator[tuple[slice, slice]]:
        """Returns where a piece lies in the bucket.

        Args:
            piece: the piece.
            ranks: neighbouring ranks, whose parts are meant; all by default.

        Returns:
            For each run of neighbouring elements the rows of the piece's codes, and the elements of the bucket.
        """
        ranks = range(self._ranks) if ranks is None else ranks
        if piece.end - piece.start == self._part and ranks:
            yield slice(ranks.start, ranks.stop), slice(ranks.start * self._part, ranks.stop * self._part)
        else:
            for rank in ranks:
                yield slice(rank, rank + 1), self.part_of(piece, rank)

    def sent(self, piece: Piece) -> Iterator[tuple[slice, slice]]:
        """As `runs`, of the parts that other ranks add."""
        yield from self.runs(piece, range(self.rank))
        yield from self.runs(piece, range(self.rank + 1, self._ranks))

    def part_of(self, piece: Piece, rank: int) -> slice:
        """Returns the elements of the bucket that a piece has of the part that a rank adds."""
        first = rank * self._part
        return slice(first + piece.start, first + piece.end)

    @property
    def residuals(self) -> tuple[Residual, Residual]:
        """Both residuals."""
        return self.worker, self.server

    @property
    def lengths(self) -> list[int]:
        """Their numbers of elements."""
        return [len(residual.committed) for residual in self.residuals]

    def by_parameter(self, *, latest: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Returns the residual of each coded parameter, with its shape; a copy.

        What this rank's codes of its part of the sum have missed is counted as its own. The sum over the ranks,
        which is what updates have not received yet, stays the same.

        Args:
            latest: with the reductions since the last update.
        """
        worker, server = (r.latest if latest else r.committed for r in self.residuals)
        flat = folded(self.codec, worker, server, self.rank)
        return ((p, view(flat, place).clone()) for p, place in self.params.items())

    def put(self, residuals: Mapping[Tensor, Tensor]) -> None:
        """Replaces the residuals of parameters. None may be pending.

        Args:
            residuals: for each parameter that is not 0.
        """
        self._write(residuals)

    def put_pending(self, residuals: Mapping[Tensor, Tensor]) -> None:
        """Replaces the pending residuals, after `put` has replaced the committed ones; see there."""
        for residual in self.residuals:
            _, pending = residual.advance()
            pending.zero_()
        self._write(residuals)

    def _write(self, residuals: Mapping[Tensor, Tensor]) -> None:
        for p in self.params.keys() & residuals.keys():
            view(self.worker.latest, self.params[p]).copy_(residuals[p])
            self.worker.changed()

    def put_back(self, p: Tensor, gradient: Tensor, scale: float) -> None:
        """Adds what has been received for a parameter, times a factor, to the latest residual of this rank."""
        view(self.worker.latest, self.params[p]).add_(gradient, alpha=scale)
        self.worker.changed()


def folded(codec: Codec, worker: Tensor, server: Tensor, rank: int) -> Tensor:
    """Returns a rank's residual of a whole bucket plus that of the part of the sum that it sends."""
    whole, part = worker.clone(), len(server)
    if part:
        whole[rank * part : (rank + 1) * part] += unrotate(codec, server)
    return whole


def view(flat: Tensor, place: Place) -> Tensor:
    """Returns the elements of a parameter in a bucket."""
    offset, shape, strides = place
    return flat.as_strided(shape, strides, flat.storage_offset() + offset)


def _gaps(params: Mapping[Tensor, Place], end: int) -> Iterator[tuple[int, int]]:
    """Returns (start, end) of what lies between parameters, before the first one, and after the last one."""
    filled = 0
    for p, (offset, _, _) in params.items():
        if filled < offset:
            yield filled, offset
        filled = offset + p.numel()
    if filled < end:
        yield filled, end


def _place(buffer: GradientBuffer, bucket: Bucket, i: int) -> Place:
    gradient = buffer.view(buffer.grad, i)
    return buffer.layout.offsets[i] - bucket.start, list(gradient.shape), list(gradient.stride())
