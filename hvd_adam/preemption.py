"""Signals that ask a job to stop soon: all ranks agree on one step after which they save and leave.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 some time before they kill (Slurm's --signal, pre-emption, requeue), to
all ranks or to one. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from hvd_adam.cluster import Cluster, horovod

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Launchers hand on what their ranks have been sent already: that is no second request.
ECHO_SECONDS = 0.2

_first: float | None = None  # when the first signal came


def asked_to_stop() -> bool:
    """Whether a signal has come to this process."""
    return _first is not None


def _note(number: int, _: FrameType | None) -> None:
    global _first
    now = time.monotonic()
    if _first is not None and now - _first > ECHO_SECONDS:
        os._exit(128 + number)
    _first = _first or now


class Preemption:
    """Answers after each update whether to stop, the same on every rank.

    Args:
        cluster: this process.
        max_time: seconds from now after which to stop without a signal; None for never.
    """

    def __init__(self, cluster: Cluster, max_time: float | None) -> None:
        self._cluster = cluster
        self._deadline = None if max_time is None else time.monotonic() + max_time
        self._request: Any = None
        for number in SIGNALS:
            signal.signal(number, _note)

    def ask(self) -> None:
        """Begins to ask all ranks, at the start of an update, so that the answer costs no time at its end."""
        if self._cluster.size > 1:
            import torch

            flag = torch.tensor([self._wants_to_stop()], dtype=torch.int32)
            self._request = horovod().allreduce_async(flag, op=horovod().Sum, name="hvd_adam.stop")

    def agreed(self) -> bool:
        """Whether to stop after this update; every rank calls it after `ask`."""
        if self._cluster.size == 1:
            return self._wants_to_stop()
        return bool(horovod().synchronize(self._request).item())

    def _wants_to_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or asked_to_stop()
