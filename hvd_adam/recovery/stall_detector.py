"""`StallDetector`: ends a job that makes no progress, with one report of what every rank is doing.

Horovod's own stall check does not work under Gloo and reports no stacks. Here a thread of every rank watches the
rank's progress, and a server answers what the rank is doing. No rank sends anything as long as the job progresses,
and Horovod is not needed when it does not. A rank without progress notifies the lowest rank that answers; that
rank collects the state of all ranks and prints the report. Any rank can do this, so a frozen rank 0 is merely a
rank that does not answer.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from hvd_adam.distributed.context import Cluster
from hvd_adam.recovery.peer_server import Request
from hvd_adam.recovery.peers import CONCURRENT_REQUESTS, Peers
from hvd_adam.recovery.stall_report import State, report, stack_of, waits_for

REPORT_SECONDS = 60.0  # the most that a report may take; a rank that nobody has asked by then ends itself
CLOSE_SECONDS = 5.0  # for this rank's thread to end


class StallDetector:
    """Watches this rank from its construction, which is collective, until `close`.

    Time in which this whole process was stopped (suspended by a scheduler) does not count. A stall is detected up
    to half of the limit, or 10 seconds, later.

    Args:
        cluster: this process.
        timeout: seconds that determine how often this rank is checked.
        remedy: what the report recommends, as a sentence without its full stop.
    """

    problem = "no progress"  # for the report

    def __init__(self, cluster: Cluster, timeout: float, remedy: str) -> None:
        self._rank, self._interval = cluster.rank, min(timeout / 4, 5.0)
        self._remedy = remedy
        self._last_progress = time.monotonic()
        self._closed = threading.Event()
        self._investigating = threading.Lock()
        self._peers = Peers(cluster, self._answer, f"hvd_adam.{type(self).__name__}")
        self._thread = _start_thread(self._watch)

    @property
    def hosts(self) -> list[str]:
        """Host names by rank."""
        return self._peers.hosts

    # What is progress, and how long a job may be without.

    def mark(self) -> float:
        """Returns a number that differs from the one before if this rank has made progress."""
        raise NotImplementedError

    def limit(self) -> float:
        """Returns the seconds without progress after which the job ends."""
        raise NotImplementedError

    def idle_of_job(self, idle: list[float]) -> float:
        """Returns for how long the job has made no progress, from the seconds of each rank that answers."""
        raise NotImplementedError

    def doing(self) -> str:
        """Returns since when this rank makes no progress, for the report; empty if that is not known."""
        raise NotImplementedError

    def progress(self) -> int:
        """Returns how much progress this rank has made; those with less are behind the others."""
        return 0

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._peers.close()
        self._thread.join(CLOSE_SECONDS)

    def _watch(self) -> None:
        """Checks for progress at each interval; runs in a thread of its own."""
        mark, last = self.mark(), time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - last > 2 * self._interval:
                self._last_progress += now - last  # this process was stopped, or had no core
            last = now
            if mark != (mark := self.mark()):
                self._last_progress = now
            if self._idle() >= self.limit() + REPORT_SECONDS:
                self._end_job({self._rank: self._state()})
            elif self._idle() >= self.limit():
                self._investigate()

    def _idle(self) -> float:
        return time.monotonic() - self._last_progress

    def _state(self) -> State:
        frames = sys._current_frames()
        main = frames[threading.main_thread().ident or 0]
        # On GPUs backward runs in threads of its own; a synchronous collective in it then waits there.
        waiting = next((frame for frame in (main, *frames.values()) if waits_for(frame)), main)
        return {
            "doing": self.doing(),
            "beats": self.progress(),
            "idle": self._idle(),
            "waits_for": waits_for(waiting),
            "stack": stack_of(waiting),
        }

    def _answer(self, request: Request) -> State:
        what = request["what"]
        if what == "state":
            return self._state()
        if what == "stalled":
            self._investigate()
        elif what == "moved":
            self._last_progress = max(self._last_progress, time.monotonic() - request["idle"])
        elif what == "end":
            os._exit(1)
        return {}

    # A stall.

    def _investigate(self) -> None:
        """Starts the investigation in a thread of its own, unless one is running."""
        if self._investigating.acquire(blocking=False):
            _start_thread(self._notify_or_report)

    def _notify_or_report(self) -> None:
        try:
            for first in range(0, self._rank, CONCURRENT_REQUESTS):
                lower = range(first, min(first + CONCURRENT_REQUESTS, self._rank))
                if any(answer is not None for answer in self._peers.ask_all(lower, what="stalled").values()):
                    return  # the lowest rank that answers continues from here
            self._collect_and_end()
        finally:
            self._investigating.release()

    def _collect_and_end(self) -> None:
        """Collects all states and ends the job, unless another rank makes progress; no lower rank has answered."""
        states: dict[int, State | None] = dict.fromkeys(range(self._rank))
        states[self._rank] = self._state()
        states |= self._peers.ask_all(range(self._rank + 1, len(self._peers)), what="state")
        idle = self.idle_of_job([state["idle"] for state in states.values() if state])
        answering = [rank for rank, state in states.items() if state and rank != self._rank]
        if idle < self.limit() - 2 * self._interval:  # another rank works, or the wait has ended
            self._last_progress = max(self._last_progress, time.monotonic() - idle)
            self._peers.ask_all(answering, what="moved", idle=idle)
        elif not self._closed.is_set():
            self._end_job(states, answering)

    def _end_job(self, states: Mapping[int, State | None], answering: Iterable[int] = ()) -> None:
        timer = threading.Timer(REPORT_SECONDS, os._exit, [1])  # in case nobody reads stderr
        timer.daemon = True
        timer.start()
        problem = f"{self.problem} for {self.limit():g} s"
        sys.stderr.write(report(states, self._peers.hosts, problem, self._remedy))
        sys.stderr.flush()
        self._peers.ask_all(answering, what="end")
        os._exit(1)


def _start_thread(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="hvd_adam.watchdog", daemon=True)
    thread.start()
    return thread
