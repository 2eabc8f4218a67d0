"""Pre-emption: on a signal, all ranks agree on one update after which they save a checkpoint and exit.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 some time before they kill a job (Slurm's --signal, pre-emption,
requeue), to all ranks or to one. Ctrl-C sends SIGINT, and a terminal or an SSH connection that closes SIGHUP.
Imports no torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.launch.signal_proxy import ECHO_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_started = time.monotonic()
_first_signal: float | None = None  # its time
_interrupted = False  # whether it was SIGINT


def stop_requested() -> bool:
    """Returns whether this process has received one of SIGNALS."""
    return _first_signal is not None


def interrupted() -> bool:
    """Returns whether the first of these signals was SIGINT, from Ctrl-C."""
    return _interrupted


def install_handlers() -> None:
    """Records the signals from now on, which would otherwise end this process; a second one still does.

    SIGHUP stays ignored where it is: the user has started the job with `nohup`.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _record)


def ignore_signals() -> None:
    """Ignores the signals from now on, so that one during Python's exit does not fail a command that succeeded."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _record(number: int, _: FrameType | None) -> None:
    global _first_signal, _interrupted
    now = time.monotonic()
    if _first_signal is not None and now - _first_signal > ECHO_SECONDS:
        os._exit(128 + number)
    if _first_signal is None:
        _first_signal, _interrupted = now, number == signal.SIGINT


class Preemption:
    """Decides after each update whether to stop, or to restart with other hosts, identically on every rank.

    Args:
        cluster: this process.
        max_time: seconds after the start of this process at which to stop without a signal; None for never.
        hosts_changed: returns whether this rank was notified of added or removed hosts; None if they cannot
            change.
        interval: seconds of updates between two questions to the other ranks, 0 for one in each update. A longer
            one spares a slow network; the answer then comes up to two intervals after a signal.

    Attributes:
        regroup: after `should_stop`, whether any rank was notified of added or removed hosts.
    """

    def __init__(
        self,
        cluster: Cluster,
        max_time: float | None = None,
        hosts_changed: Callable[[], bool] | None = None,
        *,
        interval: float = 0.0,
    ) -> None:
        self._cluster = cluster
        self._deadline = None if max_time is None else _started + max_time
        self._hosts_changed = hosts_changed or (lambda: False)
        self._request: Any = None
        self._interval = interval
        self._asked_at: float | None = None
        self._updates, self._updates_per_answer = 0, 1
        self.regroup = False
        install_handlers()

    def ask(self) -> None:
        """Starts to ask all ranks, at the start of an update, so that the answer takes no time at its end."""
        if self._cluster.size == 1 or self._request is not None:
            return
        import torch

        now = time.monotonic()
        microseconds = 0 if self._asked_at is None else round(1e6 * (now - self._asked_at) / self._updates)
        own = [self._wants_to_stop(), self._hosts_changed(), microseconds]
        values = torch.tensor(own, dtype=torch.int64, device="cpu")
        self._request = horovod().allreduce_async(values, op=horovod().Sum, name="hvd_adam.stop")
        self._asked_at, self._updates = now, 0

    def should_stop(self) -> bool:
        """Returns whether to stop after this update; every rank calls it, after `ask`, in every update."""
        if self._cluster.size == 1:
            self.regroup = self._hosts_changed()
            return self._wants_to_stop()
        self.regroup = False
        self._updates += 1
        if self._updates < self._updates_per_answer:
            return False
        stop, regroup, microseconds = horovod().synchronize(self._request).tolist()
        self._request, self.regroup = None, bool(regroup)
        if microseconds:  # per update, the sum over the ranks: the next interval is the same on all of them
            self._updates_per_answer = max(1, round(self._interval * 1e6 * self._cluster.size / microseconds))
        return bool(stop)

    def _wants_to_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or stop_requested()
