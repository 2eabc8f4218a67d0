"""`CodedAllReduce`, `CodedReduceScatter`: the mean of a bucket over the ranks, sent as codes of few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import start_allgather, start_alltoall, sum_in_rank_order
from hvd_adam.distributed.collectives.started import Chain, Sent, Started
from hvd_adam.distributed.gradients.compression import AllReduce, Reduction, Scaling
from hvd_adam.distributed.gradients.grad_scaling import element_sum
from hvd_adam.distributed.wire.codec import GROUP, Own, largest_scale
from hvd_adam.distributed.wire.coded_bucket import CodedBucket, Piece


class CodedAllReduce:
    """The sum over the ranks in two phases, each with a residual of its own.

    Every rank sends the codes of the r-th part of its bucket to rank r, which adds them in rank order in float32,
    its own gradients in their place without codes, and sends the codes of the sum to all ranks: about
    2·(N−1)/N·n·bits/8 bytes per rank. All ranks decode the same codes, so they get the same bits.

    Args:
        gradients: the bucket, with flags and message; float32, float16 or bfloat16.
        name: as in `start_reduction`.
        coded: residuals and memory of the bucket.
        scaling: a factor for the gradients.
        elsewhere: 1-dimensional gradients of coded parameters whose values are not in the bucket yet.
        meanwhile: called before a piece is encoded; returns whether it has done something.
    """

    def __init__(
        self,
        gradients: Tensor,
        name: str,
        coded: CodedBucket,
        scaling: Scaling,
        elsewhere: Mapping[Tensor, Tensor] | None = None,
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> None:
        self._coded, self._name = coded, name
        self._gradients = gradients[: coded.elements]
        self._exact_views = [gradients[start:end] for start, end in coded.exact_spans]
        self._exact = torch.cat(self._exact_views).float()
        factor = Scaling(scaling.factor, len(self._exact) - len(self._exact_views[-1]))
        self._exact_sum = AllReduce(self._exact, exact_name(name), "none", scaling=factor)
        self._clear_gaps()
        self._factor = scaling.factor
        *self._worker, self._owed = coded.worker.advance_owing()
        self._server = coded.server.advance()
        self._elsewhere = [(coded.params[p][0], values) for p, values in (elsewhere or {}).items()]
        self._own: dict[int, Own] = {}  # by piece: what this rank adds itself, until it is added
        self._sent = Sent[Tensor]()
        self._scales: list[Tensor] = []  # the largest of each piece of the sum
        for number, piece in enumerate(coded.pieces):
            while meanwhile() or self.advance():
                pass
            self._sent.add(self._send(piece, number), partial(self._receive, piece))
        self._elsewhere.clear()

    def _clear_gaps(self) -> None:
        for start, end in self._coded.zero_spans:
            self._gradients[start:end].zero_()

    def _send(self, piece: Piece, number: int) -> Chain[Tensor] | Started[Tensor]:
        coded, (before, after) = self._coded, self._worker
        for rows, elements in coded.sent(piece):
            coded.functions.encode(
                *(coded.codec, self._values(elements), before[elements], after[elements]),
                *(piece.codes[rows], self._factor, coded.unit),
            )
        received = start_alltoall(piece.codes, f"{self._name}.parts.{number}")
        self._own[number] = self._own_of(piece)
        return self._chained(piece, number, received, f"{self._name}.sum.{number}")

    def _own_of(self, piece: Piece) -> Own:
        """Returns what this rank adds itself, with what it owes."""
        coded = self._coded
        own = Own(self._values(coded.part_of(piece, coded.rank)), coded.rank, self._factor)
        if self._owed is not None:
            owed = self._owed[piece.start : piece.end] * coded.unit
            own = Own(owed.add_(own.scaled(len(owed))), own.rank, 1.0)
        return own

    def copy_own(self) -> None:
        """Copies what is still to be added into the bucket: from now on user code may change it where it is."""
        for number, own in self._own.items() if self._owed is None else ():
            values = self._gradients[self._coded.part_of(self._coded.pieces[number], own.rank)]
            if len(values) and values.data_ptr() != own.gradients.data_ptr():
                self._own[number] = own._replace(gradients=values.copy_(own.gradients))

    def _values(self, elements: slice) -> Tensor:
        """Returns gradients of this rank, from where they are; in the bucket if they are in several places."""
        gradients = self._gradients[elements]
        first, last = elements.start, elements.start + len(gradients)
        for offset, values in self._elsewhere:
            start, end = max(first, offset), min(last, offset + len(values))
            if start >= end:
                continue
            part = values[start - offset : end - offset]
            if len(part) == len(gradients):
                return part
            self._gradients[start:end] = part
        return gradients

    def _chained(
        self, piece: Piece, number: int, received: Started[Tensor], name: str
    ) -> Chain[Tensor] | Started[Tensor]:
        """Returns what gets the codes of the sum, once those of this rank's part have been received."""

        def start_gather(codes: Tensor) -> Started[Tensor]:
            coded, (before, after) = self._coded, (r[piece.start : piece.end] for r in self._server)
            rest = before, after, piece.total, coded.unit
            coded.functions.add_and_encode(coded.codec, codes, self._own.pop(number), *rest)
            return start_allgather(piece.total, name)

        return Chain(received, start_gather)

    def probe(self) -> Tensor | None:
        """Returns what `element_sum` does for the sum of the bucket, once it is there, without a pass over it.

        Returns:
            None if only a pass can tell: on a GPU, or if the sums are so large that decoding may have overflowed.
        """
        if not self._scales:
            return None
        largest = torch.stack(self._scales).amax()  # NaN if the sum of a block is not finite
        if largest * (GROUP * self._coded.codec.levels) >= torch.finfo(self._gradients.dtype).max:
            return None
        return element_sum(self._exact) + largest

    def advance(self) -> bool:
        """Adds the codes of a piece and sends the sum, or decodes the sum of one, if it has arrived."""
        return self._sent.advance()

    @property
    def has_arrived(self) -> bool:
        """Whether all sums are there."""
        return self._sent.has_arrived and self._exact_sum.has_arrived

    def wait(self) -> None:
        """Waits for the sum."""
        self._sent.wait()
        self._finish()

    def _finish(self) -> None:
        """Waits for what is sent exactly, once all pieces have been decoded."""
        # Errors of neighbours in a block. They would be in the norm of a shard, and another compression, after a
        # change, would add them over the ranks in each update until they are infinite.
        self._clear_gaps()
        self._exact_sum.wait()
        sums = torch.split(self._exact, list(map(len, self._exact_views)))
        torch._foreach_copy_(self._exact_views, list(sums))

    def _receive(self, piece: Piece, received: Tensor) -> None:
        """Decodes the sum of a piece."""
        coded = self._coded
        for rows, elements in coded.runs(piece):
            coded.functions.decode(coded.codec, received[rows], self._gradients[elements])
        if received.is_cpu:
            self._scales.append(largest_scale(coded.codec, received))


class CodedReduceScatter(CodedAllReduce):
    """The first phase alone: each rank gets the sum of its own shard, and all ranks what is sent exactly."""

    def _chained(self, piece: Piece, number: int, received: Started[Tensor], name: str) -> Started[Tensor]:
        return received.then(partial(self._sum, piece, number))

    def _sum(self, piece: Piece, number: int, codes: Tensor) -> Tensor:
        coded, own, elements = self._coded, self._own.pop(number), piece.end - piece.start
        parts = torch.empty(len(codes), elements, dtype=torch.float32, device=codes.device)
        for rows, _ in coded.sent(piece):
            coded.functions.decode(coded.codec, codes[rows], parts[rows].view(-1))
        parts[own.rank] = own.scaled(elements)
        return sum_in_rank_order(parts)

    def _receive(self, piece: Piece, received: Tensor) -> None:
        self._gradients[self._coded.part_of(piece, self._coded.rank)] = received


def sum_of(reduction: Reduction, gradients: Tensor) -> Tensor:
    """Returns what `element_sum` does for gradients that a reduction has added.

    Args:
        reduction: has arrived.
        gradients: all of its bucket, or a part that is there.
    """
    known = reduction.probe() if isinstance(reduction, CodedAllReduce) else None
    return element_sum(gradients) if known is None else known


def exact_name(name: str) -> str:
    """Returns the name of the all-reduce of what is sent exactly."""
    return f"{name}.exact"
