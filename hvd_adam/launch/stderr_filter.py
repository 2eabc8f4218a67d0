"""A filter for the stderr of launchers that removes reports which only repeat a rank's own message.

A rank that exits with 2 (bad input) or 75 (stopped, try again) has printed one line with the reason. mpirun
then adds two boxes of text, and horovodrun with Gloo a "Terminated" for every rank that it terminated after the
first. Ranks on other hosts may also report, in boxes and in lines that count them, that the rank has
disconnected. These come last, and are left out if the job's exit code is 2 or 75: mpirun prints the code after
the first of them. With Gloo Horovod's thread prints such a line, which is left out if a rank has printed an error
of its own. mpirun also warns if a child that starts ssh has made itself the leader of its process group
before mpirun could: both try, so that no time passes without one. mpirun's line about a signal that it forwards
is left out, and its report of a rank that this SIGUSR1 has ended, because it has no handler. Every other report
passes, as does every box that this filter does not recognize. Text passes immediately.

The launch scripts run this file by its path with ``python -I``: it imports nothing but the standard library and
starts in a few hundredths of a second.
"""

import os
import re
import signal
import sys

RULE = b"-" * 74
MAX_BOX_LINES = 20  # the reports have four, eight and sixteen
OPENING = re.compile(
    rb"Primary job +terminated|\w+ detected that one or more processes exited with non-zero"
    rb"|An MPI communication peer process has unexpectedly disconnected"
    rb"|\w+ noticed that process rank \d+ .* exited on signal \d+ \(User defined signal 1\)"
)
ENDED_BY_USR1 = re.compile(rb"^\w+ noticed that process rank \d+ .* \(User defined signal 1\)", re.MULTILINE)
FORWARDING = re.compile(rb"mpirun: Forwarding signal \d+ to job\s")
GENERAL_REPORT = re.compile(rb"^Primary job .* non-zero exit code", re.DOTALL | re.MULTILINE)
EXIT_CODE_REPORT = re.compile(rb"Exit code: +(2|75)\s")
DISCONNECTED = re.compile(rb"^An MPI communication peer process has unexpectedly disconnected", re.MULTILINE)
MORE_DISCONNECTED = re.compile(rb"\[[^]]+:\d+\] \d+ more process.* sent help message \S+ / peer hung up\s")
SHOW_ALL = re.compile(rb'\[[^]]+:\d+\] Set MCA parameter "orte_base_help_aggregate"')  # after the first such line
SETPGID = re.compile(rb"\[[^]]+:\d+\] plm:rsh: Warning: setpgid\(\d+,\d+\) failed in parent .*Permission denied")
TERMINATED = b"]<stderr>:Terminated\n"  # after "[" and the rank
LOST_PEER = re.compile(
    rb"\[\d+\]<stderr>:.*Horovod background loop uncaught exception: .*Connection (reset|closed)"
)
OWN_ERROR = re.compile(rb"\[\d+\]<stderr>:hvd_adam[.\w]*: error: ")


def may_be_terminated_line(line: bytes) -> bool:
    """Whether the line is the shell's "Terminated" of a rank that horovodrun terminated, or a beginning of it."""
    rest = line.lstrip(b"[").lstrip(b"0123456789")
    return line.startswith(b"[") and TERMINATED.startswith(rest)


def relay(source: int, target: int) -> None:
    """Copies from one file descriptor to another until the end of file, without the reports above.

    Incomplete lines (progress bars) are copied immediately, unless they may become a line that opens a box.
    """
    line = b""
    box: list[bytes] = []
    disconnected: list[bytes] = []  # boxes, and lines that count more of them
    forwarded = False  # whether mpirun has forwarded a signal
    explained = False  # whether the rank that ended the job has printed the reason
    lost: list[bytes] = []  # lines of ranks under Gloo whose connection another rank has ended
    named = False  # whether a rank under horovodrun has printed an error of its own
    while chunk := os.read(source, 65536):
        line += chunk
        out = b""
        while end := line.find(b"\n") + 1:
            complete, line = line[:end], line[end:]
            if may_be_terminated_line(complete) or SETPGID.match(complete):
                continue
            named = named or bool(OWN_ERROR.match(complete))
            if LOST_PEER.match(complete):
                lost.append(complete)
                continue
            if FORWARDING.match(complete):
                forwarded = True
                continue
            if MORE_DISCONNECTED.match(complete) or (
                SHOW_ALL.match(complete) and MORE_DISCONNECTED.match(b"".join(disconnected[-1:]))
            ):
                disconnected.append(complete)
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
                text, box = b"".join(box), []
                if EXIT_CODE_REPORT.search(text):
                    explained = True
                elif DISCONNECTED.search(text):
                    disconnected.append(text)
                elif not GENERAL_REPORT.search(text) and not (forwarded and ENDED_BY_USR1.search(text)):
                    out += text
        if not box and not RULE.startswith(line) and not may_be_terminated_line(line):
            out, line = out + line, b""
        os.write(target, out)
    rest = [*([] if explained else disconnected), *([] if named else lost)]
    os.write(target, b"".join(box) + line + b"".join(rest))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # They are meant for the launcher. The filter must still copy what the launcher prints before it exits.
        signal.signal(number, signal.SIG_IGN)
    relay(sys.stdin.fileno(), sys.stdout.fileno())
