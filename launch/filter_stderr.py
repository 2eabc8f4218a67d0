"""A filter for the launchers' stderr: passes everything on live, except what only repeats a rank's own words.

A rank that ends with 2 (bad input) or 75 (stopped, try again) has said why in one line of its own; mpirun adds
two boxes of text to it, and horovodrun with Gloo a "Terminated" for every rank that it ended with the first. Any
other report stays, as does every box that this program does not know.
"""

import os
import re
import signal
import sys

RULE = b"-" * 74
LONGEST_BOX = 12  # lines; the reports have four and eight
OPENING = re.compile(rb"Primary job +terminated|\w+ detected that one or more processes exited with non-zero")
GENERAL = re.compile(rb"^Primary job .* non-zero exit code", re.DOTALL)
PARTICULAR = re.compile(rb"Exit code: +(2|75)\s")
ENDED = b"]<stderr>:Terminated\n"  # after "[" and the rank


def is_ended(line: bytes) -> bool:
    """Whether the line is the shell's word on a rank that horovodrun ended, or may become it."""
    rest = line.lstrip(b"[").lstrip(b"0123456789")
    return line.startswith(b"[") and ENDED.startswith(rest)


def keep(box: list[bytes]) -> bytes:
    """The box of lines as it is, or nothing where it only repeats what a rank has said."""
    text = b"".join(box[1:])
    return b"" if GENERAL.search(text) or PARTICULAR.search(text) else box[0] + text


def relay(source: int, target: int) -> None:
    """Copies `source` to `target` until its end; half lines too (progress bars), unless they may be a rule."""
    line, box = b"", []
    while chunk := os.read(source, 65536):
        line += chunk
        out = b""
        while end := line.find(b"\n") + 1:
            complete, line = line[:end], line[end:]
            if is_ended(complete):
                continue
            is_rule = complete.rstrip() == RULE
            if not box and not is_rule:
                out += complete
                continue
            box.append(complete)
            unknown = len(box) == 2 and not OPENING.match(complete)
            if unknown or len(box) > LONGEST_BOX:
                out, box = out + b"".join(box), []
            elif is_rule and len(box) > 1:
                out, box = out + keep(box), []
        if not box and not RULE.startswith(line) and not is_ended(line):
            out, line = out + line, b""
        os.write(target, out)
    os.write(target, b"".join(box) + line)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for mpirun, whose last words must still pass
    relay(sys.stdin.fileno(), sys.stdout.fileno())
