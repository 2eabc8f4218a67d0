"""Follows an examination in another process, here or by ssh, and notices its end, whichever way that comes."""

from __future__ import annotations

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any

from hvd_adam.distributed.launch_env import BUILD_COMMAND
from hvd_adam.doctor.checks import Check, Report, fail
from hvd_adam.doctor.worker import LOAD_SECONDS, MARK

SLACK = 5.0  # seconds after a stage's own end, for a busy machine
KILL_SECONDS = 5.0
END_SECONDS = 30.0  # for MPI to end, which waits for all ranks
WORKER = (sys.executable, "-m", "hvd_adam.doctor.worker")

# What a stage that did not come to its end was, and what to do.
STAGES = {
    "": ("worker", f"see that this Python is whole: `{BUILD_COMMAND}`"),
    "machine": ("machine", "look for a file system that hangs: df, the output folder, /dev/shm"),
    "software": ("torch", f"see whether `python -c 'import torch, horovod.torch'` works; else `{BUILD_COMMAND}`"),
    "arrival": (
        "ranks",
        "see what the other ranks say, and that each host can be reached from this one on any port; name the "
        "interface (-i); in Slurm start with srun --mpi=pmix; if they are only slow, use a longer --timeout",
    ),
    "links": (
        "network",
        "see that the hosts reach each other on any port (firewall), and name the interface (-i)",
    ),
    "start": (
        "Horovod starts",
        "see that the hosts reach each other on any port, and name the interface (-i); if it is only slow, use a "
        "longer --timeout",
    ),
    "speed": ("sums", "see that the hosts reach each other on any port, and name the interface (-i)"),
}


class EndedError(Exception):
    """The launcher ends the job."""


@dataclass
class Findings:
    """What an examination has told so far.

    Attributes:
        reports: by rank; this rank's alone until the others have answered.
        gathered: whether those of all ranks are there.
        checks: what the examination judged itself, or what its end is judged as.
        links: as `hvd_adam.doctor.links.Point.measure` returns them; None if not measured.
        started: the number of ranks that Horovod has; 0 if it has not started.
        device: on which ranks compute, "cpu" or "cuda".
        speeds: of each rank, as `hvd_adam.doctor.speed` has them.
        missing: ranks that have not come; None if that is not what went wrong.
        done: whether it came to its end.
        stage: what it does, or did last.
        overdue: whether it had to be given up.
        ended: whether the launcher ended the job meanwhile.
        code: the exit code with which it ended before its end.
        said: the last of its stderr.
    """

    reports: list[Report] = field(default_factory=list)
    gathered: bool = False
    checks: list[Check] = field(default_factory=list)
    links: list[dict[str, Any]] | None = None
    started: int = 0
    device: str = "cpu"
    speeds: list[dict[str, float]] = field(default_factory=list)
    missing: list[int] | None = None
    done: bool = False
    stage: str = ""
    overdue: bool = False
    ended: bool = False
    code: int | None = None
    said: deque[str] = field(default_factory=lambda: deque(maxlen=100))

    def take(self, message: dict[str, Any]) -> None:
        """Takes in one message of the worker."""
        self.stage = message.get("doing", self.stage)
        if "report" in message:
            self.reports = [Report.of(message["report"])]
        if "reports" in message:
            self.reports = [Report.of(plain) for plain in message["reports"]]
            self.gathered = "missing" not in message
        if "check" in message:
            self.checks.append(Check(**message["check"]))
        for name in ("links", "started", "device", "speeds", "missing", "done"):
            if name in message:
                setattr(self, name, message[name])


@contextmanager
def following(command: Sequence[str], task: dict[str, Any]) -> Iterator[Findings]:
    """Starts an examination, waits for its end, and gives what it has found; then ends the process.

    So what was found can be told while the process still stands: a launcher may end the job with it.

    Args:
        command: starts `hvd_adam.doctor.worker`, here or elsewhere.
        task: what it is to do.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, errors="replace", **pipes)
    findings, lines = Findings(), queue.Queue()
    threading.Thread(target=_read, args=[process.stdout, lines], daemon=True).start()
    threading.Thread(target=findings.said.extend, args=[process.stderr], daemon=True).start()
    try:
        with suppress(OSError):  # it has ended already: seen below
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        try:
            with _sigterm_raises():
                _listen(process, lines, findings)
        except EndedError:
            findings.ended = True
            findings.checks.append(ended(findings))
        yield findings
        if findings.done:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # nothing kills a process that waits for a dead file system
            process.wait(KILL_SECONDS)


def _listen(process: subprocess.Popen, lines: queue.Queue, findings: Findings) -> None:
    begin, allowed = time.monotonic(), LOAD_SECONDS
    while not findings.done:
        try:
            line = lines.get(timeout=max(0.0, begin + allowed + SLACK - time.monotonic()))
        except queue.Empty:
            findings.overdue = True
            findings.checks.append(late(findings, time.monotonic() - begin))
            return
        if line is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
            time.sleep(0.2)  # for the rest of its stderr
            findings.code = process.returncode
            findings.checks.append(broken(findings, process.returncode))
            return
        if line.startswith(MARK):
            message = json.loads(line.removeprefix(MARK))
            findings.take(message)
            if "doing" in message:
                begin, allowed = time.monotonic(), message["seconds"]


def _read(stream: IO[str], lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what is left is a moment's work
        raise EndedError

    if threading.current_thread() is not threading.main_thread():  # only there signals can be caught
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


def late(findings: Findings, seconds: float) -> Check:
    """The check of a stage that does not come to its end."""
    name, remedy = STAGES[findings.stage]
    if findings.stage == "arrival":
        return fail(name, f"not all have come to MPI's start within {seconds:.0f} s", remedy)
    return fail(name, f"no end within {seconds:.0f} s", remedy)


def broken(findings: Findings, code: int | None) -> Check:
    """The check of a stage in which the process ended.

    Args:
        findings: so far.
        code: its exit code, negative for a signal.
    """
    name, remedy = STAGES[findings.stage]
    how = f"with exit code {code}"
    if code is not None and code < 0:
        how = f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"by signal {-code}"
    return fail(name, f"the process ended {how}{telling(findings.said)}", remedy)


def ended(findings: Findings) -> Check:
    """The check of a job that the launcher has ended meanwhile."""
    found = f"the launcher ended the job while this rank was at: {STAGES[findings.stage][0]}"
    return fail("ranks", found, "see what the other ranks and the launcher say")


def telling(said: Sequence[str]) -> str:
    """The line of a library's outpour that tells most, in brackets; "" if there is none."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in tuple(said)]
    lines = [line for line in lines if re.search(r"\w", line)]
    named = [line for line in lines if re.search(r"error|fail|not able|cannot|unable", line, re.IGNORECASE)]
    return f" ({(named or lines)[-1][:200]})" if lines else ""
