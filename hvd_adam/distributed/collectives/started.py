"""Collectives under way: `Started`, a `Chain` of two, `Sent` pieces, and a `Pipeline` of what has stages."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Generic, Protocol, TypeVar

from hvd_adam.distributed.context import horovod

T = TypeVar("T")
U = TypeVar("U")


class Started(Generic[T]):
    """A collective, in one or several pieces.

    Args:
        handles: of Horovod, one for each piece.
        result: makes the result of what Horovod returns for each.
        name: of the collective; reports of a stalled job show it.
    """

    def __init__(self, handles: Sequence[int], result: Callable[[list[Any]], T], name: str) -> None:
        self._pieces, self._result, self._name = handles, result, name

    def __call__(self) -> T:
        """Waits for the collective, and returns its result. Call it once."""
        return self._result(list(self.each()))

    def each(self) -> Iterator[Any]:
        """Waits for one piece after the other, and yields what Horovod returns for it. In place of a call."""
        handles, self._pieces = self._pieces, ()  # Horovod forgets those it has been asked to wait for
        yield from map(horovod().synchronize, handles)

    def advance(self) -> bool:
        """Does nothing: it has one stage."""
        return False

    @property
    def has_arrived(self) -> bool:
        """Whether a call does not wait: the collective has ended, or failed."""
        return all(map(horovod().poll, self._pieces))

    def then(self, function: Callable[[T], U]) -> Started[U]:
        """Returns the same collective with a function of its result as the result."""
        return Started(self._pieces, lambda received: function(self._result(received)), self._name)


class Chain(Generic[T]):
    """Two collectives, the second of which sends what becomes of the result of the first.

    Args:
        first: the first one.
        start: starts the second one.
    """

    def __init__(self, first: Started[Any], start: Callable[[Any], Started[T]]) -> None:
        self._first, self._start = first, start
        self._continues = False  # whether a caller already waits for the first one, to start the second
        self._second: Started[T] | None = None

    def __call__(self) -> T:
        """Waits for both, and returns the result of the second. Call it once."""
        self._continue()
        assert self._second is not None
        return self._second()

    def advance(self) -> bool:
        """Starts the second collective if that needs no waiting. Returns whether it has."""
        if self._continues or not self._first.has_arrived:
            return False
        self._continue()
        return True

    @property
    def has_arrived(self) -> bool:
        """As `Started.has_arrived`, of the second collective once it has been started."""
        return self._second is not None and self._second.has_arrived

    def _continue(self) -> None:
        if not self._continues:
            self._continues = True
            self._second = self._start(self._first())


class Sent(Generic[T]):
    """Pieces of one tensor that are under way, and what receives them."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[Started[T] | Chain[T], Callable[[T], None]]] = deque()

    def add(self, started: Started[T] | Chain[T], receive: Callable[[T], None]) -> None:
        """Adds a piece.

        Args:
            started: gets its result.
            receive: uses the result.
        """
        self._pieces.append((started, receive))

    def advance(self) -> bool:
        """Starts the second collective of a piece, or receives the first piece, if that needs no waiting.

        Returns:
            Whether there was anything to do.
        """
        if any(started.advance() for started, _ in self._pieces):
            return True
        arrived = bool(self._pieces) and self._pieces[0][0].has_arrived
        if arrived:
            self._receive_first()
        return arrived

    @property
    def has_arrived(self) -> bool:
        """Whether all pieces have been received."""
        return not self._pieces

    def wait(self) -> None:
        """Waits for all pieces, and receives them."""
        while self._pieces:
            self._receive_first()

    def _receive_first(self) -> None:
        started, receive = self._pieces.popleft()
        receive(started())


class Stages(Protocol):
    """Several collectives and the work between them."""

    def advance(self) -> bool:
        """Does what is next, as far as that needs no waiting. Returns whether there was anything to do."""

    @property
    def has_arrived(self) -> bool:
        """Whether nothing is left to do or to wait for."""


class Pipeline:
    """What is in flight, in the order in which it was started, and so arrives."""

    LOOKED_AFTER = 4  # of the first at a time, and of the others

    def __init__(self) -> None:
        self._stages: deque[Stages] = deque()
        self._turn = 0  # of the others: which was looked after last

    def add(self, stages: Stages) -> None:
        """Adds what has been started, which `advance` then continues."""
        self._stages.append(stages)

    def advance(self) -> bool:
        """Does what is next for one of them, the first before others. Returns whether there was anything to do.

        The others have turns: a rank that has started them in another order may wait for any of them.
        """
        while self._stages and self._stages[0].has_arrived:
            self._stages.popleft()
        first = islice(self._stages, self.LOOKED_AFTER)
        return any(stages.advance() for stages in chain(first, self._next_others()))

    def _next_others(self) -> Iterator[Stages]:
        others = len(self._stages) - self.LOOKED_AFTER
        for _ in range(min(others, self.LOOKED_AFTER)):
            self._turn = (self._turn + 1) % others
            yield self._stages[self.LOOKED_AFTER + self._turn]

    def clear(self) -> None:
        """Called when all has been waited for."""
        self._stages.clear()
