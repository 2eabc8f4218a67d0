"""`Timeline`: computing and communication of one rank as a simulation of discrete events. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Operation:
    """A collective.

    Attributes:
        seconds: that it takes on idle processors.
        cpu: share of a core that it needs meanwhile, in [0, 1].
        ready: when this rank has started it.
        left: seconds on idle processors until it is done.
    """

    seconds: float
    cpu: float
    ready: float
    left: float

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.left <= 0.0


class Timeline:
    """The main thread of a rank, which computes, and Horovod's thread, which runs one collective after another.

    Horovod's thread looks for new tensors once a cycle, agrees with the other ranks which of them are ready, and
    runs these in order; meanwhile it does not look (Sergeev and Del Balso, arXiv 1802.05799; operations.cc,
    `RunLoopOnce`). If both threads need more cores than the rank has, they share them as Linux' fair scheduler
    does: the thread that needs less than half gets what it needs, the other one the rest.

    Args:
        cycle: seconds between two looks of an idle thread.
        negotiation: seconds of an agreement.
        cores: of this rank, > 0.
        threads: that the main thread computes with.

    Attributes:
        now: seconds since the start.
        exposed: seconds that the main thread has waited for collectives.
        busy: seconds in which a collective ran.
    """

    def __init__(
        self, cycle: float = 0.0, negotiation: float = 0.0, cores: float = math.inf, threads: int = 1
    ) -> None:
        self._cycle, self._negotiation, self._cores, self._threads = cycle, negotiation, cores, threads
        self._queue: list[Operation] = []
        self._begin = math.inf  # when the next collective begins
        self._batch = 0  # collectives of the queue that were agreed on already
        self.now = self.exposed = self.busy = 0.0

    def start(self, seconds: float, cpu: float) -> Operation:
        """Adds a collective to the queue.

        Args:
            seconds: that it takes on idle processors.
            cpu: core-seconds that it needs.
        """
        operation = Operation(seconds, min(1.0, cpu / seconds) if seconds else 0.0, self.now, max(seconds, 1e-12))
        if not self._queue:
            self._begin = self.now + self._cycle / 2 + self._negotiation  # a look is half a cycle away on average
        self._queue.append(operation)
        return operation

    def compute(self, seconds: float) -> None:
        """The main thread computes for so many seconds on an idle machine."""
        self._advance(seconds * max(1.0, self._threads / self._cores), None)

    def wait(self, operation: Operation) -> None:
        """The main thread waits for a collective."""
        before = self.now
        self._advance(math.inf, operation)
        self.exposed += self.now - before

    def _rates(self, computing: bool) -> tuple[float, float]:
        """Returns the speeds of main thread and collective, in [0, 1]; 0 for a collective that has not begun."""
        running = bool(self._queue) and self.now >= self._begin
        if not running:
            return 1.0, 0.0
        need, share = self._queue[0].cpu, min(1.0, self._cores / self._threads)
        main = min(1.0, self._cores) if computing else 0.0
        got = min(need, max(self._cores - main * self._threads, self._cores / 2))
        if not computing:
            got = min(need, self._cores)
        speed = got / need if need else 1.0
        left = min(share, (self._cores - got) / self._threads)
        return left / share, speed

    def _advance(self, work: float, until: Operation | None) -> None:
        """Lets time pass until the main thread has computed, or a collective is done."""
        computing = until is None
        while (work > 1e-12) if until is None else not until.is_done:
            main, speed = self._rates(computing)
            steps = [work / main] if computing and main > 0 else []
            if speed > 0:
                steps.append(self._queue[0].left / speed)
            elif self._queue and self.now < self._begin:
                steps.append(self._begin - self.now)
            step = min(steps)
            self.now += step
            if speed > 0:
                self.busy += step
                self._queue[0].left -= step * speed
                if self._queue[0].left <= 1e-12:
                    self._end_first()
            elif self._queue and self._begin - self.now <= 1e-12:
                self.now = max(self.now, self._begin)
                self._batch = len(self._queue)
            if computing:
                work -= step * main

    def _end_first(self) -> None:
        self._queue.pop(0).left = 0.0
        self._batch -= 1
        if self._queue and self._batch <= 0:  # what has come meanwhile is agreed on first
            self._begin = self.now + self._negotiation
