"""`Watchdog`: ends a job that makes no progress, as the calls of `beat` show it."""

from __future__ import annotations

import os

from hvd_adam.distributed.context import Cluster
from hvd_adam.recovery.stall_detector import REPORT_SECONDS, StallDetector

SETUP_SECONDS = 600.0  # the least limit until the second update: data are downloaded and kernels compiled
REMEDY = "If the job was only slow, use a longer timeout, or call beat() more often"

_open: set[Watchdog] = set()


def defer_horovod_stall_shutdown(timeout: float) -> None:
    """Makes Horovod's stall shutdown act later than the watchdog, unless the user has set it.

    Call it before `init`.

    Args:
        timeout: of the watchdog, in seconds.
    """
    longest = max(timeout, SETUP_SECONDS) + 2 * REPORT_SECONDS
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(round(longest)))


class Watchdog(StallDetector):
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
        self._timeout, self._beats, self._doing = timeout, 0, "the set-up"
        super().__init__(cluster, timeout, remedy)
        _open.add(self)

    def beat(self, doing: str) -> None:
        """Records progress; costs two assignments.

        Args:
            doing: what this rank starts to do, for the report.
        """
        self._doing = doing
        self._beats += 1

    def close(self) -> None:
        """Stops watching."""
        _open.discard(self)
        super().close()

    def mark(self) -> float:
        """As in `StallDetector`."""
        return self._beats

    def limit(self) -> float:
        """As in `StallDetector`."""
        return self._timeout if self._beats > 1 else max(self._timeout, SETUP_SECONDS)

    def idle_of_job(self, idle: list[float]) -> float:
        """As in `StallDetector`; another rank may work, on its share of the test set for instance."""
        return min(idle)

    def doing(self) -> str:
        """As in `StallDetector`."""
        return self._doing

    def progress(self) -> int:
        """As in `StallDetector`."""
        return self._beats


def is_watched() -> bool:
    """Returns whether a watchdog decides when this job has stalled."""
    return bool(_open)
