"""Ends a job that makes no progress, with one report of what every rank is doing.

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

SETUP_SECONDS = 600.0  # the least limit until the second update: data are downloaded and kernels compiled
REPORT_SECONDS = 60.0  # the most that a report may take; a rank that nobody has asked by then ends itself
REMEDY = "If the job was only slow, use a longer timeout, or call beat() more often"
CLOSE_SECONDS = 5.0  # for this rank's thread to end


def defer_horovod_stall_shutdown(timeout: float) -> None:
    """Makes Horovod's stall shutdown act later than the watchdog, unless the user has set it.

    Call it before `init`.

    Args:
        timeout: of the watchdog, in seconds.
    """
    longest = max(timeout, SETUP_SECONDS) + 2 * REPORT_SECONDS
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(round(longest)))


class Watchdog:
    """Watches this rank from its construction, which is collective, until `close`.

    Progress of any rank is progress of the job. Time in which this whole process was stopped (suspended by a
    scheduler) does not count.

    Args:
        cluster: this process.
        timeout: seconds without progress after which the job ends with exit code 1, above 0. A stall is detected
            up to half as much, or 10 seconds, later. Until the second `beat` the limit is at least SETUP_SECONDS.
        remedy: what the report recommends, as a sentence without its full stop.
    """

    def __init__(self, cluster: Cluster, timeout: float, remedy: str = REMEDY) -> None:
        self._rank, self._timeout, self._interval = cluster.rank, timeout, min(timeout / 4, 5.0)
        self._remedy = remedy
        self._beats, self._doing = 0, "the set-up"
        self._last_progress = time.monotonic()
        self._closed = threading.Event()
        self._investigating = threading.Lock()
        self._peers = Peers(cluster, self._answer, "hvd_adam.watchdog")
        self._thread = _start_thread(self._watch)

    def beat(self, doing: str) -> None:
        """Records progress; costs two assignments.

        Args:
            doing: what this rank starts to do, for the report.
        """
        self._doing = doing
        self._beats += 1

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._peers.close()
        self._thread.join(CLOSE_SECONDS)

    def _watch(self) -> None:
        """Checks for progress at each interval; runs in a thread of its own."""
        beats, last = 0, time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - last > 2 * self._interval:
                self._last_progress += now - last  # this process was stopped, or had no core
            last = now
            if beats != self._beats:
                beats, self._last_progress = self._beats, now
            if self._idle() >= self._limit() + REPORT_SECONDS:
                self._end_job({self._rank: self._state()})
            elif self._idle() >= self._limit():
                self._investigate()

    def _idle(self) -> float:
        return time.monotonic() - self._last_progress

    def _limit(self) -> float:
        return self._timeout if self._beats > 1 else max(self._timeout, SETUP_SECONDS)

    def _state(self) -> State:
        frames = sys._current_frames()
        main = frames[threading.main_thread().ident or 0]
        # On GPUs backward runs in threads of its own; a synchronous collective in it then waits there.
        waiting = next((frame for frame in (main, *frames.values()) if waits_for(frame)), main)
        return {
            "doing": self._doing,
            "beats": self._beats,
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
        idle = min(state["idle"] for state in states.values() if state)
        answering = [rank for rank, state in states.items() if state and rank != self._rank]
        if (
            idle < self._limit() - 2 * self._interval
        ):  # another rank works, on its share of the test set for instance
            self._last_progress = max(self._last_progress, time.monotonic() - idle)
            self._peers.ask_all(answering, what="moved", idle=idle)
        elif not self._closed.is_set():
            self._end_job(states, answering)

    def _end_job(self, states: Mapping[int, State | None], answering: Iterable[int] = ()) -> None:
        timer = threading.Timer(REPORT_SECONDS, os._exit, [1])  # in case nobody reads stderr
        timer.daemon = True
        timer.start()
        sys.stderr.write(report(states, self._peers.hosts, self._limit(), self._remedy))
        sys.stderr.flush()
        self._peers.ask_all(answering, what="end")
        os._exit(1)


def _start_thread(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target, name="hvd_adam.watchdog", daemon=True)
    thread.start()
    return thread
