"""Signals that ask a job to stop soon: all ranks agree on one step after which they save and leave.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 some time before they kill (Slurm's --signal, pre-emption, requeue), to
all ranks or to one. Imports no torch.
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

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_started = time.monotonic()
_first: float | None = None  # when the first signal came


def stop_requested() -> bool:
    """Whether a signal has come to this process."""
    return _first is not None


def install_handlers() -> None:
    """From now on the signals are noted, where by themselves they would end this process."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ignore_signals() -> None:
    """All is done: what comes now must not make a failure of it, as it would once Python has begun to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: FrameType | None) -> None:
    global _first
    now = time.monotonic()
    if _first is not None and now - _first > ECHO_SECONDS:
        os._exit(128 + number)
    _first = _first or now


class Preemption:
    """Answers after each update whether to stop, or to regroup, the same on every rank.

    Args:
        cluster: this process.
        max_time: seconds since this process began after which to stop without a signal; None for never.
        hosts_changed: whether this rank has heard of hosts that came or left; None where none can.

    Attributes:
        regroup: after `should_stop`, whether a rank has heard of hosts that came or left.
    """

    def __init__(
        self, cluster: Cluster, max_time: float | None, hosts_changed: Callable[[], bool] | None = None
    ) -> None:
        self._cluster = cluster
        self._deadline = None if max_time is None else _started + max_time
        self._hosts_changed = hosts_changed or (lambda: False)
        self._request: Any = None
        self.regroup = False
        install_handlers()

    def ask(self) -> None:
        """Begins to ask all ranks, at the start of an update, so that the answer costs no time at its end."""
        if self._cluster.size > 1:
            import torch

            flags = torch.tensor([self._wants_to_stop(), self._hosts_changed()], dtype=torch.int32)
            self._request = horovod().allreduce_async(flags, op=horovod().Sum, name="hvd_adam.stop")

    def should_stop(self) -> bool:
        """Whether to stop after this update; every rank calls it after `ask`."""
        if self._cluster.size == 1:
            self.regroup = self._hosts_changed()
            return self._wants_to_stop()
        stop, self.regroup = map(bool, horovod().synchronize(self._request).tolist())
        return stop

    def _wants_to_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or stop_requested()
