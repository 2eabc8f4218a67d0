"""`Timeline`: computing and communication of one rank as a simulation of discrete events. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of the time that a rank has waited: its pauses grow with it, see `collectives.waiting`.
PAUSE_SHARE = 0.23

NOTICED = 2  # messages of an agreement that are noticed one after another


@dataclass
class Phase:
    """A part of what Horovod's thread does.

    Attributes:
        left: seconds on idle processors until it is done.
        cpu: share of a core that it needs meanwhile, in [0, 1].
        answers: messages that must be noticed one after another.
        starts_batch: whether it is an agreement: what has come until its end needs no other one.
    """

    left: float
    cpu: float = 0.0
    answers: float = 0.0
    starts_batch: bool = False


@dataclass(frozen=True)
class Operation:
    """A collective: first its messages, then its bytes."""

    messages: Phase
    transfer: Phase

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.transfer.left <= 0.0


@dataclass(frozen=True)
class Processors:
    """What computing and communication of a rank share.

    Attributes:
        cores: of this rank, > 0.
        threads: that the main thread computes with.
        slice: seconds for which Linux lets a thread compute before another one that waits for the core runs.
    """

    cores: float = math.inf
    threads: int = 1
    slice: float = 0.0

    @property
    def delay(self) -> float:
        """Seconds until Horovod's thread notices a message while the main thread computes; 0 with another core.

        It yields the core whenever there is nothing to do, and runs again after one slice of each thread that
        computes on this core.
        """
        return 0.0 if self.cores >= self.threads + 1 else self.slice * max(1.0, self.threads / self.cores)


class Timeline:
    """The main thread of a rank, which computes, and Horovod's thread, which runs one collective after another.

    Horovod's thread looks for new tensors once a cycle, agrees with the other ranks which of them are ready, and
    runs these in order; meanwhile it does not look (Sergeev and Del Balso, arXiv 1802.05799; operations.cc,
    `RunLoopOnce`). If both threads need more cores than the rank has, they share them as Linux' fair scheduler
    does: the thread that needs less than half gets what it needs, the other one the rest.

    Args:
        cycle: seconds between two looks of an idle thread.
        negotiation: seconds of an agreement.
        processors: of this rank.
        longest_pause: seconds between two looks of a main thread that waits, at most.

    Attributes:
        now: seconds since the start.
        exposed: seconds that the main thread has waited for collectives.
    """

    def __init__(
        self,
        cycle: float = 0.0,
        negotiation: float = 0.0,
        processors: Processors | None = None,
        longest_pause: float = 0.0,
    ) -> None:
        self._cycle, self._negotiation, self._longest_pause = cycle, negotiation, longest_pause
        self._processors = processors or Processors()
        self._queue: list[Phase] = []
        self._waiting: list[Operation] = []  # for the next agreement
        self.now = self.exposed = 0.0

    def start(self, seconds: float, cpu: float = 0.0, latency: float = 0.0, messages: float = 0.0) -> Operation:
        """Adds a collective to those that wait for an agreement.

        Args:
            seconds: that it takes on idle processors.
            cpu: core-seconds that it needs.
            latency: seconds of its messages, part of `seconds`.
            messages: their number.
        """
        bytes_alone = max(seconds - latency, 1e-12)
        operation = Operation(
            Phase(max(latency, 1e-12), 0.0, messages), Phase(bytes_alone, min(1.0, cpu / bytes_alone))
        )
        self._waiting.append(operation)
        if not self._queue:
            self._agree(self._cycle / 2)  # a look is half a cycle away on average
        return operation

    def compute(self, seconds: float) -> None:
        """The main thread computes for so many seconds on an idle machine."""
        its = self._processors
        self._advance(seconds * max(1.0, its.threads / its.cores), (), computing=True)

    def wait(self, *operations: Operation) -> None:
        """The main thread sleeps until one of the collectives is done, and on average half a pause longer."""
        before = self.now
        self._advance(math.inf, operations, computing=False)
        pause = min(self._longest_pause, PAUSE_SHARE * (self.now - before))
        self._advance(pause / 2, (), computing=False)
        self.exposed += self.now - before

    def _agree(self, pause: float) -> None:
        self._queue.append(Phase(max(pause + self._negotiation, 1e-12), answers=NOTICED, starts_batch=True))

    def _rates(self, computing: bool) -> tuple[float, float]:
        """Returns the speeds of main thread and of the first phase, in [0, 1]."""
        its, phase = self._processors, self._queue[0]
        if not computing:
            return 1.0, min(1.0, its.cores / phase.cpu) if phase.cpu else 1.0
        if phase.answers:
            return 1.0, phase.left / (phase.left + phase.answers * its.delay)
        share, main = min(1.0, its.cores / its.threads), min(1.0, its.cores)
        got = min(phase.cpu, max(its.cores - main * its.threads, its.cores / 2))
        left = min(share, (its.cores - got) / its.threads)
        return left / share, got / phase.cpu if phase.cpu else 1.0

    def _advance(self, work: float, until: Sequence[Operation], *, computing: bool) -> None:
        """Lets time pass until one of the collectives is done, or the main thread has computed or slept.

        Args:
            work: seconds of the main thread on an idle machine.
            until: the collectives; without any, time passes until the work is done.
            computing: whether the main thread computes.
        """
        while not any(operation.is_done for operation in until) if until else work > 1e-12:
            main, speed = self._rates(computing) if self._queue else (1.0, 0.0)
            steps = [work / main] if not until and main > 0 else []
            if speed > 0:
                steps.append(self._queue[0].left / speed)
            step = min(steps)
            self.now += step
            work -= step * main
            if self._queue:
                phase = self._queue[0]
                phase.answers *= max(0.0, 1 - step * speed / phase.left)
                phase.left -= step * speed
                if phase.left <= 1e-12:
                    self._end_first()

    def _end_first(self) -> None:
        phase = self._queue.pop(0)
        phase.left = 0.0
        if phase.starts_batch:
            for operation in self._waiting:
                self._queue += [operation.messages, operation.transfer]
            self._waiting.clear()
        elif not self._queue and self._waiting:  # what has come meanwhile is agreed on first
            self._agree(0.0)
