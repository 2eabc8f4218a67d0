"""Runs a module with a core for each host of `scaling_validation.py`, or for each rank inside a host.

Namespaces share the scheduler of this machine, which would move the ranks of one "host" to the cores of another.

python -m helpers.on_own_core MODULE ARGUMENT…
"""

import os
import runpy
import socket
import sys

from hvd_adam.bench.link import HOSTS
from hvd_adam.distributed.launch_env import detect_launcher


def main() -> None:
    """Sets the affinity before any thread exists, and runs the module."""
    cores, host = sorted(os.sched_getaffinity(0)), socket.gethostname()
    number = [*HOSTS].index(host) if host in HOSTS else detect_launcher().rank
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
