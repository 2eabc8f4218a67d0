"""Runs mpirun so that a first SIGTERM reaches the ranks, as SIGUSR1: save and stop. A second one ends them.

mpirun cannot forward SIGTERM: it takes it as an order to kill, gives the ranks one second, and ends with 1. What
other signals come to this program it passes on as they are. Its exit code is mpirun's, 128 + n after signal n.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1  # linux/prctl.h
ECHO_SECONDS = 0.2  # "timeout", for one, signals its child, and then the child's group


def stand_apart() -> None:
    """The launcher hears of signals to the group from this program alone, and ends with it."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(command: list[str], **options: int) -> subprocess.Popen:
    """Starts the launcher, to which this program from now on passes its signals; `options` are Popen's."""
    launcher = subprocess.Popen(command, preexec_fn=stand_apart, **options)
    begun, ended = None, False  # when the first SIGTERM came; whether the launcher was told to kill

    def pass_on(number: int, _: object) -> None:
        nonlocal begun, ended
        if number == signal.SIGTERM:
            begun = begun or time.monotonic()
            if time.monotonic() - begun < ECHO_SECONDS:
                number = signal.SIGUSR1
            elif ended:
                return  # the next one would end mpirun before it has killed its ranks
            else:
                ended = True
        launcher.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, pass_on)
    return launcher


def end(launcher: subprocess.Popen) -> int:
    """Waits for its end; its exit code, 128 + n after signal n."""
    code = launcher.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(end(start(sys.argv[1:])))
