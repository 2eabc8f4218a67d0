"""Run mpirun so that ranks receive a first SIGTERM, SIGINT or SIGHUP as SIGUSR1 (save and stop). A second kills.

mpirun cannot forward these three: it kills the ranks after one second and exits with 1. Others are forwarded
unchanged. The exit code is mpirun's, 128 + n after signal n, and 130 instead of any failure after SIGINT (Ctrl-C).

The launch scripts run this file by its path with ``python -I``: it imports nothing but the standard library and
starts in a few hundredths of a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# Seconds during which a signal that arrives twice counts as one. "timeout", for example, signals its child and
# then the child's process group; launchers forward what their ranks have already received.
ECHO_SECONDS = 0.2

_interrupted = False  # whether this process has received SIGINT


def isolate() -> None:
    """Gives the launcher a process group of its own, and has it terminated when this process ends.

    A signal to the group of this process then reaches the launcher through `start`'s handler only.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts the launcher and forwards to it the signals that this process receives; `options` are Popen's."""
    launcher: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # to forward as soon as the launcher has started
    first: float | None = None  # time of the first SIGTERM, SIGINT or SIGHUP
    terminating = False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal first, terminating
        global _interrupted
        _interrupted = _interrupted or number == signal.SIGINT
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            first = first or time.monotonic()
            if time.monotonic() - first < ECHO_SECONDS:
                number = signal.SIGUSR1
            elif terminating:
                return  # one more would end mpirun before it has killed its ranks
            else:
                number, terminating = signal.SIGTERM, True
        if launcher is None:
            early.append(number)
        else:
            launcher.send_signal(number)

    # Before the launcher starts: until then a background command of bash ignores SIGINT, and others kill it.
    for number in FORWARDED:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: by nohup
            signal.signal(number, forward)
    launcher = subprocess.Popen(command, preexec_fn=isolate, **options)
    while early:
        launcher.send_signal(early.pop(0))
    return launcher


def wait(launcher: subprocess.Popen[bytes]) -> int:
    """Waits for the launcher to exit. Returns its exit code, 128 + n after signal n."""
    code = launcher.wait()
    return code if code >= 0 else 128 - code


def interrupted() -> bool:
    """Returns whether this process has received SIGINT."""
    return _interrupted


def leave(code: int) -> NoReturn:
    """Exits with the exit code of the job: 130 if it was interrupted and has failed or stopped early, else `code`.

    One more signal must not change the code: at its end, Python replaces handlers by the default, which kills.
    """
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + signal.SIGINT if _interrupted and code else code)


if __name__ == "__main__":
    leave(wait(start(sys.argv[1:])))
