"""A filter for the stderr of launchers that removes reports which only repeat a rank's own message.

A rank that exits with 2 (bad input) or 75 (stopped, try again) has printed one line with the reason. mpirun then
adds two boxes of text, and horovodrun with Gloo a "Terminated" for every rank that it terminated after the first.
mpirun also warns if a child that starts ssh has made itself the leader of its process group before mpirun could:
both try, so that no time passes without one. Every other report passes, as does every box that this filter does
not recognize. Text passes immediately.

The launch scripts run this file by its path with ``python -I``: it imports nothing but the standard library and
starts in a few hundredths of a second.
"""

import os
import re
import signal
import sys

RULE = b"-" * 74
MAX_BOX_LINES = 12  # the reports have four and eight
OPENING = re.compile(rb"Primary job +terminated|\w+ detected that one or more processes exited with non-zero")
GENERAL_REPORT = re.compile(rb"^Primary job .* non-zero exit code", re.DOTALL)
EXIT_CODE_REPORT = re.compile(rb"Exit code: +(2|75)\s")
SETPGID = re.compile(rb"\[[^]]+:\d+\] plm:rsh: Warning: setpgid\(\d+,\d+\) failed in parent .*Permission denied")
TERMINATED = b"]<stderr>:Terminated\n"  # after "[" and the rank


def may_be_terminated_line(line: bytes) -> bool:
    """Whether the line is the shell's "Terminated" of a rank that horovodrun terminated, or a beginning of it."""
    rest = line.lstrip(b"[").lstrip(b"0123456789")
    return line.startswith(b"[") and TERMINATED.startswith(rest)


def filter_box(box: list[bytes]) -> bytes:
    """Returns the lines of the box, or nothing if the box only repeats a rank's own message."""
    text = b"".join(box[1:])
    return b"" if GENERAL_REPORT.search(text) or EXIT_CODE_REPORT.search(text) else box[0] + text


def relay(source: int, target: int) -> None:
    """Copies from one file descriptor to another until the end of file, without the reports above.

    Incomplete lines (progress bars) are copied immediately, unless they may become a line that opens a box.
    """
    line = b""
    box: list[bytes] = []
    while chunk := os.read(source, 65536):
        line += chunk
        out = b""
        while end := line.find(b"\n") + 1:
            complete, line = line[:end], line[end:]
            if may_be_terminated_line(complete) or SETPGID.match(complete):
                continue
            is_rule = complete.rstrip() == RULE
            if not box and not is_rule:
                out += complete
                continue
            box.append(complete)
            unknown = len(box) == 2 and not OPENING.match(complete)
            if unknown or len(box) > MAX_BOX_LINES:
                out, box = out + b"".join(box), []
            elif is_rule and len(box) > 1:
                out, box = out + filter_box(box), []
        if not box and not RULE.startswith(line) and not may_be_terminated_line(line):
            out, line = out + line, b""
        os.write(target, out)
    os.write(target, b"".join(box) + line)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # They are meant for the launcher. The filter must still copy what the launcher prints before it exits.
        signal.signal(number, signal.SIG_IGN)
    relay(sys.stdin.fileno(), sys.stdout.fileno())
