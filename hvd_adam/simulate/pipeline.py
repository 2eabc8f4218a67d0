"""`Pipeline`: the reductions that a simulated rank has started, piece by piece. Imports no torch.

As `distributed.collectives.started`: pieces that have arrived are taken further while others travel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from hvd_adam.simulate.timeline import Operation, Timeline
from hvd_adam.simulate.workload import Bucket

LOOKED_AFTER = 4  # buckets at a time, as in collectives.started


@dataclass
class Piece:
    """Elements of a bucket that are sent at a time.

    Attributes:
        elements: of all ranks' parts together.
        operation: their collective.
        is_last: whether no other collective follows.
    """

    elements: float
    operation: Operation
    is_last: bool


@dataclass
class Sent:
    """A bucket that is being reduced.

    Attributes:
        bucket: the bucket.
        exact: the collective of what codes leave out, if there are codes.
        pieces: that have been sent, and not been received.
    """

    bucket: Bucket
    exact: Operation | None
    pieces: deque[Piece] = field(default_factory=deque)


class Pipeline:
    """Buckets that are being reduced, in the order in which they are sent.

    Args:
        time: of the rank.
        gather: adds the parts of so many elements, and starts the collective that follows.
        receive: uses so many elements that have arrived.
        works_meanwhile: whether a rank does so for other pieces while it waits for one.

    Attributes:
        sent: the buckets.
    """

    def __init__(
        self,
        time: Timeline,
        gather: Callable[[float], Operation],
        receive: Callable[[float], None],
        *,
        works_meanwhile: bool,
    ) -> None:
        self._time, self._gather, self._receive, self._works = time, gather, receive, works_meanwhile
        self.sent: list[Sent] = []

    def wait(self, operation: Operation) -> None:
        """Waits for a collective, and takes pieces further meanwhile."""
        while not operation.is_done:
            if not self.advance():
                self._time.wait(operation, *(piece.operation for _, piece in self._looked_after()))

    def receive(self, sent: Sent) -> None:
        """Waits for a bucket."""
        while sent.pieces:
            piece = sent.pieces[0]
            self.wait(piece.operation)
            self._follow(sent, piece)
        if sent.exact is not None:
            self.wait(sent.exact)

    def advance(self) -> bool:
        """Takes a piece further that has arrived. Returns whether there was one."""
        for sent, piece in self._looked_after():
            if piece.operation.is_done:
                self._follow(sent, piece)
                return True
        return False

    def _looked_after(self) -> Iterator[tuple[Sent, Piece]]:
        """Returns pieces that are taken further when they arrive, in the order in which a rank looks."""
        unfinished = (sent for sent in self.sent if sent.pieces and self._works)
        for sent in islice(unfinished, LOOKED_AFTER):
            yield from ((sent, piece) for piece in sent.pieces if not piece.is_last)
            if sent.pieces[0].is_last:  # they are received in order
                yield sent, sent.pieces[0]

    def _follow(self, sent: Sent, piece: Piece) -> None:
        if piece.is_last:
            sent.pieces.popleft()
            self._receive(piece.elements)
        else:
            piece.operation, piece.is_last = self._gather(piece.elements), True
