"""srun with the exit code of the rank that ended first, where srun has that of those it then kills (143).

Signals reach the ranks as pass_signals.py has it. A rank that ends with 2 (bad input) or 75 (stopped, try again)
has said why in one line of its own: what srun adds to it is left out.
"""

import re
import subprocess
import sys

from pass_signals import end, start

EXITED = re.compile(rb"^srun: error: \S+: tasks? \S+: Exited with exit code (\d+)")
OWN = re.compile(rb"^(srun|slurmstepd\S*): |^Terminated$")
SAID = (2, 75)

# A node that lost power in the middle of a step has left that step's PMIx socket in its spool folder, over which
# the same step of the job, queued anew, stumbles. The next step has another name.
UNLAUNCHED = b"aborted before step completely launched"
ATTEMPTS = 3


def main(command: list[str]) -> int:
    """Runs the command, srun; returns the exit code."""
    for _ in range(ATTEMPTS):
        code, launched = run(command)
        if launched:
            break
        print("hvd_adam: srun could not start all ranks; tries again", file=sys.stderr, flush=True)
    return code


def run(command: list[str]) -> tuple[int, bool]:
    """Runs it once; also returns whether it has started the ranks."""
    srun = start(command, stderr=subprocess.PIPE)
    first, launched = None, True
    for line in srun.stderr:
        exited = EXITED.match(line)
        first = first or (int(exited[1]) if exited else None)
        launched = launched and UNLAUNCHED not in line
        if first not in SAID or not OWN.match(line):
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
    code = end(srun)
    return first if first is not None and code > 128 else code, launched


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
