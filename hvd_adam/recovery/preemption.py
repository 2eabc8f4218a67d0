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

# Where ranks ask rarely. The number of updates follows the answer before the last, so an answer comes within four
# times as long, or one update. A signal may be in the one after it: ranks stop within 2 s, or two updates.
# Bare horovodrun with Gloo kills them after 5 s, Slurm after 30, the launch scripts with Gloo after 60.
SECONDS_PER_ANSWER = 0.25

_started = time.monotonic()
_first_signal: float | None = None  # its time
_interrupted = False  # whether it was SIGINT
_second_exits_with: int | None = None  # the exit code after one more; None for 128 + its number


def stop_requested() -> bool:
    """Returns whether this process has received one of SIGNALS."""
    return _first_signal is not None


def interrupted() -> bool:
    """Returns whether the first of these signals was SIGINT, from Ctrl-C."""
    return _interrupted


def install_handlers() -> None:
    """Records the signals from now on, which would otherwise end this process; a second one still does.

    A second SIGUSR1 or SIGUSR2 does not: schedulers, launchers and containers may each ask to save and stop.

    SIGHUP stays ignored where it is: the user has started the job with `nohup`.
    """
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _record)


def exit_on_second_signal(code: int) -> None:
    """Makes `code` the exit code of this process if one more signal ends it: it has nothing left to save.

    Launchers end the other ranks once one has exited. One of these, which exits a moment later than rank 0, would
    otherwise change the exit code of the job.
    """
    global _second_exits_with
    _second_exits_with = code


def ignore_signals() -> None:
    """Ignores the signals from now on, so that one during Python's exit does not fail a command that succeeded."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _record(number: int, _: FrameType | None) -> None:
    global _first_signal, _interrupted
    now = time.monotonic()
    repeated = number in (signal.SIGUSR1, signal.SIGUSR2)
    if _first_signal is not None and now - _first_signal > ECHO_SECONDS and not repeated:
        os._exit(128 + number if _second_exits_with is None else _second_exits_with)
    if _first_signal is None:
        _first_signal, _interrupted = now, number == signal.SIGINT


class Preemption:
    """Decides after each update whether to stop, or to restart with other hosts, identically on every rank.

    Args:
        cluster: this process.
        max_time: seconds after the start of this process at which to stop without a signal; None for never.
        hosts_changed: returns whether this rank was notified of added or removed hosts; None if they cannot
            change.
        most_updates: updates between two questions to the other ranks, at most. Above 1, their number begins at 1.
            It doubles after an answer that a rank has waited for, so that a slow network and a slower rank hold up
            few updates, and halves after one that took more than SECONDS_PER_ANSWER. Ranks stop up to twice as
            many updates after a signal.

    Attributes:
        regroup: after `should_stop`, whether any rank was notified of added or removed hosts.
    """

    def __init__(
        self,
        cluster: Cluster,
        max_time: float | None = None,
        hosts_changed: Callable[[], bool] | None = None,
        *,
        most_updates: int = 1,
    ) -> None:
        self._cluster = cluster
        self._deadline = None if max_time is None else _started + max_time
        self._hosts_changed = hosts_changed or (lambda: False)
        self._request: Any = None
        self._updates, self._updates_per_answer, self._most_updates = 0, 1, most_updates
        self._asked_at = 0.0
        self._waited = False  # whether this rank has waited for the last answer
        self._was_late = False  # whether that took more than SECONDS_PER_ANSWER
        self.regroup = False
        install_handlers()

    def ask(self) -> None:
        """Starts to ask all ranks, at the start of an update, so that the answer takes no time at its end."""
        if self._cluster.size == 1 or self._request is not None:
            return
        import torch

        own = [self._wants_to_stop(), self._hosts_changed(), self._waited, self._was_late]
        flags = torch.tensor(own, dtype=torch.int32, device="cpu")
        self._request = horovod().allreduce_async(flags, op=horovod().Sum, name="hvd_adam.stop")
        self._asked_at = time.monotonic()

    def should_stop(self) -> bool:
        """Returns whether to stop after this update; every rank calls it, after `ask`, in every update."""
        if self._cluster.size == 1:
            self.regroup = self._hosts_changed()
            return self._wants_to_stop()
        self.regroup = False
        self._updates += 1
        if self._updates < self._updates_per_answer:
            return False
        self._waited = not horovod().poll(self._request)
        stop, self.regroup, waited, was_late = map(bool, horovod().synchronize(self._request).tolist())
        self._was_late = time.monotonic() - self._asked_at > SECONDS_PER_ANSWER
        self._request, self._updates = None, 0
        if was_late:  # on some rank; all change the number after the same update
            self._updates_per_answer = max(self._updates_per_answer // 2, 1)
        elif waited:
            self._updates_per_answer = min(2 * self._updates_per_answer, self._most_updates)
        return stop

    def _wants_to_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() > self._deadline
        return late or stop_requested()
