"""`UpdateTimes`: where the time of this rank's updates goes, as the host sees it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import fmean, median, median_low
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")

# One update of a window counts at most this many times the window's median, so that one that was interrupted
# does not make the mean. It is above 1, so that a loader whose batches arrive in bursts counts.
_MOST_OF_MEDIAN = 1.25


class WindowTimes(NamedTuple):
    """Times of one rank in a window of updates, in seconds per update.

    Attributes:
        own: mean of the work that no other rank can delay, each update limited to 1.25 times the median.
        data: mean time for the next batches.
        compute: mean time of the passes and the update, without waiting for collectives.
        least_wait: lower quartile of the time spent waiting for collectives: that of updates for which this rank
            was the last to be ready, so the time of the transfer.
        update: median time of an update.
        preempted: mean time for which a thread of this rank was ready to run, but had no processor.
    """

    own: float
    data: float
    compute: float
    least_wait: float
    update: float
    preempted: float = 0.0


class UpdateTimes:
    """Measures the updates of this rank. Reads clocks of the host only, and never waits for the device.

    Args:
        waited: returns the seconds that this process has waited for collectives so far.
        clock: returns the time in seconds.
        preempted: returns the seconds since its last call for which a thread was ready, but had no processor.
    """

    def __init__(
        self,
        waited: Callable[[], float],
        clock: Callable[[], float] = time.perf_counter,
        preempted: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._waited, self._clock, self._preempted = waited, clock, preempted
        self._rows: list[tuple[float, float, float]] = []
        self._data, self._ready, self._waited_before = 0.0, clock(), waited()

    def __len__(self) -> int:
        return len(self._rows)

    def timed(self, batches: Iterator[Item]) -> Iterator[Item]:
        """Yields the batches, and counts the time that they take to arrive."""
        while True:
            start = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._ready, self._waited_before = self._clock(), self._waited()
            self._data += self._ready - start
            yield batch

    def update_ended(self) -> None:
        """Ends an update, which began when its last batch had arrived."""
        wait = self._waited() - self._waited_before
        self._rows.append((self._data, self._clock() - self._ready - wait, wait))
        self._data = 0.0

    def take(self) -> WindowTimes:
        """Returns the times since the last call, of at least one update, and forgets them."""
        rows, self._rows = self._rows, []
        data, compute, wait = zip(*rows, strict=True)
        own = [sum(row[:2]) for row in rows]
        most = _MOST_OF_MEDIAN * median_low(own)
        return WindowTimes(
            own=fmean(min(seconds, most) for seconds in own),
            data=fmean(data),
            compute=fmean(compute),
            least_wait=sorted(wait)[math.ceil(len(wait) / 4) - 1],
            update=median(map(sum, rows)),
            preempted=self._preempted() / len(rows),
        )
