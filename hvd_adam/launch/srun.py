"""Run srun and exit with the code of the rank that exited first, not of those that srun killed then (143).

    python -m hvd_adam.launch.srun srun --mpi=pmix ... python -m hvd_adam.train ...

Signals reach the ranks as `signal_proxy` forwards them. A rank that exits with 2 (bad input) or 75 (stopped, try
again) has printed one line with the reason: srun's own messages about it are left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import NoReturn

from hvd_adam.launch.signal_proxy import interrupted, leave, start, wait

RANK_EXITED = re.compile(rb"^srun: error: \S+: tasks? \S+: Exited with exit code (\d+)")
SRUN_MESSAGE = re.compile(rb"^(srun|slurmstepd\S*): |^Terminated$")
EXPLAINED_CODES = (2, 75)

# A node that lost power during a step leaves that step's PMIx socket in its spool directory. When the job is
# requeued, the same step fails to launch because of it. The next step has another name.
NOT_LAUNCHED = b"aborted before step completely launched"
ATTEMPTS = 3


def main(command: list[str]) -> NoReturn:
    """Runs `command`, an srun command line, and exits with the exit code of the job."""
    for _ in range(ATTEMPTS):
        code, launched = run(command)
        if launched or interrupted():
            break
        print("hvd_adam: srun could not start all ranks; trying again", file=sys.stderr, flush=True)
    leave(code)


def run(command: list[str]) -> tuple[int, bool]:
    """Runs the command once. Returns the exit code and whether srun started all ranks."""
    srun = start(command, stderr=subprocess.PIPE)
    first, launched = None, True
    assert srun.stderr is not None
    for line in srun.stderr:
        exited = RANK_EXITED.match(line)
        first = first or (int(exited[1]) if exited else None)
        launched = launched and NOT_LAUNCHED not in line
        if first not in EXPLAINED_CODES or not SRUN_MESSAGE.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    code = wait(srun)
    return first if first is not None and code > 128 else code, launched


if __name__ == "__main__":
    main(sys.argv[1:])
