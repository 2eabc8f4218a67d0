"""`RunDelays`: how long this process was ready to run, but had no processor."""

from __future__ import annotations

import os

_TASKS = "/proc/self/task"
# A thread that runs for less than this part of the busiest one's time decides nothing: it waits for that one to
# leave the processor that they share.
_BUSY = 0.25


class RunDelays:
    """Reads the time that Linux counts for each thread on a run queue (Documentation/scheduler/sched-stats.rst).

    Other processes on the same processors make it grow, and so does a CPU quota. A thread that sleeps, or waits
    for data or for another rank, is on no run queue. What slows computation down without taking the processor
    away, such as a neighbour on the other half of a core, does not show in it.
    """

    def __init__(self) -> None:
        self._before = _times()

    def since_last_call(self) -> float:
        """Returns the seconds of the busy thread that was delayed most; 0 where Linux does not tell."""
        before, self._before = self._before, _times()
        since = [
            (run - before[thread][0], delay - before[thread][1])
            for thread, (run, delay) in self._before.items()
            if thread in before
        ]
        busiest = max((run for run, _ in since), default=0)
        return max((delay for run, delay in since if run >= _BUSY * busiest), default=0) / 1e9


def _times() -> dict[str, tuple[int, int]]:
    """Returns for each thread the nanoseconds that it ran, and that it was ready but did not run."""
    found = {}
    for thread in os.listdir(_TASKS):
        try:
            with open(f"{_TASKS}/{thread}/schedstat", "rb") as file:
                run, delay, _ = map(int, file.read().split())
        except (OSError, ValueError):  # it has ended, or this kernel has no statistics
            continue
        found[thread] = run, delay
    return found
