"""Run mpirun so that the ranks receive a first SIGTERM as SIGUSR1 (save and stop). A second SIGTERM ends them.

mpirun cannot forward SIGTERM: it kills the ranks after one second and exits with 1. Other signals are forwarded
unchanged. The exit code is mpirun's, 128 + n after signal n.

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
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h

# Seconds during which a signal that arrives twice counts as one. "timeout", for example, signals its child and
# then the child's process group; launchers forward what their ranks have already received.
ECHO_SECONDS = 0.2


def isolate() -> None:
    """Gives the launcher a process group of its own, and has it terminated when this process ends.

    A signal to the group of this process then reaches the launcher through `start`'s handler only.
    """
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts the launcher and forwards to it the signals that this process receives; `options` are Popen's."""
    launcher = subprocess.Popen(command, preexec_fn=isolate, **options)
    first_sigterm: float | None = None
    terminating = False

    def forward(number: int, _: FrameType | None) -> None:
        nonlocal first_sigterm, terminating
        if number == signal.SIGTERM:
            first_sigterm = first_sigterm or time.monotonic()
            if time.monotonic() - first_sigterm < ECHO_SECONDS:
                number = signal.SIGUSR1
            elif terminating:
                return  # one more would end mpirun before it has killed its ranks
            else:
                terminating = True
        launcher.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    return launcher


def wait(launcher: subprocess.Popen[bytes]) -> int:
    """Waits for the launcher to exit. Returns its exit code, 128 + n after signal n."""
    code = launcher.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(wait(start(sys.argv[1:])))
