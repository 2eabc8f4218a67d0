"""`init`: starts Horovod, and limits how long a rank waits in a collective.

Horovod ends a job in which some ranks do not take part in a collective, with MPI only. Here a thread of every rank
looks at which collective the rank is waiting for. Nothing is sent until one has taken too long.
"""

from __future__ import annotations

import os
import sys
import time

from hvd_adam.distributed import context
from hvd_adam.distributed.context import PROCESS_SETS, Cluster, horovod
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import UserError
from hvd_adam.recovery.stall_detector import StallDetector
from hvd_adam.recovery.stall_report import oldest_wait
from hvd_adam.recovery.watchdog import is_watched

LIMIT = "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"  # Horovod's own variable
REMEDY = (
    "All ranks must call the same collectives in the same order, those of backward() and step() too. If a rank "
    f"was only busy by itself, set {LIMIT} to more seconds, or to 0 for no limit"
)

_limited: tuple[Cluster, CollectiveTimeout | None] | None = None


def init(device: str = "auto", *, process_sets: bool = False, cycle_time_ms: float | None = None) -> Cluster:
    """Starts Horovod, and assigns this process a device and a share of the host's cores.

    Call it once at the start of the program, on every rank, in place of `hvd.init()`. The first call is a
    collective. Later calls return the same `Cluster`; their arguments have no effect, with a warning except for
    `device`. After `hvd.shutdown()` a call starts Horovod again, on every rank, with Gloo only.

    It makes the assigned GPU the current one. Unless OMP_NUM_THREADS is set, it sets PyTorch's number of threads
    so that the ranks of a host share its cores. It sets environment variables of Horovod and Open MPI that the
    user has not set (`horovod_defaults`). If Horovod has been started before, these have no effect, and a warning
    names them. On CPUs it makes malloc keep freed memory, unless an environment variable of malloc is set.

    A collective that some rank waits for longer than HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, 600 by default, ends the
    job: a rank may be busy by itself, such as with an evaluation or a download, for as long. 0 is no limit. With
    MPI, Horovod ends the job itself. Where it cannot, with Gloo and with process sets, all ranks exit with code 1
    and one of them prints what each was doing; not under an elastic launcher. A watchdog, such as `guard` with
    `stall_timeout`, decides instead while there is one.

    Args:
        device: "cpu", "cuda" (one GPU per rank), or "auto": one GPU per rank if any rank has a GPU, else the CPU.
        process_sets: let some of the ranks exchange among themselves, for `distribute(islands=…)`; on every rank.
            Each cycle of Horovod then sends one more small message between all ranks.
        cycle_time_ms: milliseconds between two looks of Horovod for new collectives, in which the ranks exchange
            small messages, above 0 and at most 1000; on every rank. None: 0.1 under MPI, 0.5 under Gloo on one
            host, and 2 on several. HOROVOD_CYCLE_TIME in the environment has precedence. With `strategy="local"`,
            which makes collectives rarely, 10 sends less.

    Returns:
        Rank, world size and device of this process. In a process that no launcher started, the size is 1.

    Raises:
        UserError: an argument is out of range; Horovod cannot be loaded, with the reason; the launcher started
            more processes than Horovod sees; a host has fewer GPUs than ranks. Every rank that started Horovod
            raises it. Also after `hvd.shutdown()` with MPI.
        RankError: under an elastic launcher, the launcher does not answer or has removed this host.

    Example:
        >>> cluster = init()
        >>> model.to(cluster.device)
    """
    cluster = context.init(device, process_sets=process_sets, cycle_time_ms=cycle_time_ms)
    if _limited is None or _limited[0] is not cluster:
        _limit_collectives(cluster)
    return cluster


def _limit_collectives(cluster: Cluster) -> None:
    """Starts the watch of a cluster, in place of that of an earlier one. Every rank must call it."""
    global _limited
    if _limited is not None and _limited[1] is not None:
        _limited[1].close()
    watch = None
    # Horovod itself looks for missing ranks under MPI only, and only in collectives of all ranks.
    is_needed = horovod().gloo_enabled() or os.environ.get(PROCESS_SETS, "0") not in ("", "0")
    if cluster.size > 1 and is_needed and not is_elastic():
        seconds = horovod().broadcast_object(limit_seconds(), 0, name="hvd_adam.collective_timeout")
        watch = CollectiveTimeout(cluster, seconds) if seconds > 0 else None
    _limited = cluster, watch


def limit_seconds() -> float:
    """Returns the limit that the environment sets; 0 for none.

    Raises:
        UserError: it is not a number.
    """
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0"):
        return 0.0
    value = os.environ.get(LIMIT) or "0"
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{LIMIT} is {value!r}: use seconds, or 0 for no limit") from None


class CollectiveTimeout(StallDetector):
    """Ends the job once a rank has waited for one collective for some time, whatever the others do.

    As the time-out of `torch.distributed`. It does nothing while a watchdog is open.

    Args:
        cluster: this process.
        seconds: the time, above 0.
    """

    problem = "a collective has not ended"

    def __init__(self, cluster: Cluster, seconds: float) -> None:
        self._seconds = seconds
        super().__init__(cluster, seconds, REMEDY)

    def mark(self) -> float:
        """Returns the number of the collective that this rank waits for; without one, always another number."""
        number = None if is_watched() else oldest_wait(sys._current_frames().values())
        return time.monotonic() if number is None else number

    def limit(self) -> float:
        """As in `StallDetector`."""
        return self._seconds

    def idle_of_job(self, idle: list[float]) -> float:
        """As in `StallDetector`."""
        return max(idle)

    def doing(self) -> str:
        """As in `StallDetector`."""
        return ""
