"""Starts and monitors a worker process, here or over ssh, and detects every way in which it can end."""

from __future__ import annotations

import json
import os
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

from hvd_adam.distributed.launch_env import BUILD_COMMAND, detect_launcher
from hvd_adam.doctor.report import INSTALL_COMMAND, Check, Report, fail
from hvd_adam.doctor.worker import LOAD_SECONDS, PREFIX

SLACK = 5.0  # seconds beyond a stage's own time limit, for a busy machine
KILL_SECONDS = 5.0
EXIT_SECONDS = 30.0  # MPI's finalization waits for all ranks
STDERR_SECONDS = 0.2  # for the rest of stderr to arrive after the process has ended
WORKER = (sys.executable, "-m", "hvd_adam.doctor.worker")

# Lines of Open MPI that name no cause.
_NO_CAUSE = re.compile(
    "MPI_ERRORS_ARE_FATAL|Local abort before MPI_INIT|your MPI job|An error occurred in MPI_|Unknown error|"
    "ORTE_ERROR_LOG"
)
# Variables that choose how Open MPI works, without those that mpirun sets itself.
_CHOICES_OF_MPI = re.compile("OMPI_MCA_(?!ess|orte_|pmix|initial_wdir|mpi_oversubscribe|shmem_RUNTIME)")

_CHECK_NETWORK = "check that the hosts reach each other on any port (firewall), and name the interface (-i)"

# The name of the check and the remedy, if the worker hangs or ends in a stage.
STAGES = {
    "": ("worker", f"check that this Python works; if it does not: {INSTALL_COMMAND}, then `{BUILD_COMMAND}`"),
    "machine": ("machine", "look for a file system that hangs: df, the output directory, /dev/shm"),
    "software": (
        "torch",
        f"check whether `python -c 'import torch, horovod.torch'` works; if it does not: `{BUILD_COMMAND}`",
    ),
    "arrival": (
        "ranks",
        "read the messages of the other ranks; check that each host can be reached from this one on any port; "
        "name the interface (-i); under Slurm start with srun --mpi=pmix; if the ranks are only slow, use a "
        "longer --timeout",
    ),
    "links": ("network", _CHECK_NETWORK),
    "start": ("Horovod starts", "if it is only slow, use a longer --timeout"),  # `_remedy` adds to it
    "speed": ("sums", _CHECK_NETWORK),
}


class JobEndedError(Exception):
    """The launcher, or another process, sent SIGTERM to this rank."""


@dataclass
class Findings:
    """The results of a worker so far.

    Attributes:
        reports: by rank; only this rank's until the other ranks have sent theirs.
        gathered: whether `reports` holds those of all ranks.
        checks: failures found by the worker, or the failure by which it ended.
        links: as `hvd_adam.doctor.links.Point.measure` returns them; None if not measured.
        started: number of ranks of Horovod; 0 if it has not started.
        device: device type that ranks compute on, "cpu" or "cuda".
        speeds: of each rank, as `hvd_adam.doctor.throughput` returns them.
        missing: ranks that did not respond; None if none is missing.
        done: whether the worker has completed all its stages.
        stage: the current or last stage, a key of `STAGES`.
        overdue: whether the worker exceeded a time limit.
        job_ended: whether the launcher ended the job before the worker had completed.
        code: exit code of a worker that ended early.
        stderr: the last lines of the worker's stderr.
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
    job_ended: bool = False
    code: int | None = None
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=100))

    def update(self, message: dict[str, Any]) -> None:
        """Adds the content of one message of the worker."""
        self.stage = message.get("doing", self.stage)
        if "report" in message:
            self.reports = [Report.from_json(message["report"])]
        if "reports" in message:
            self.reports = [Report.from_json(values) for values in message["reports"]]
            self.gathered = "missing" not in message
        if "check" in message:
            self.checks.append(Check(**message["check"]))
        for name in ("links", "started", "device", "speeds", "missing", "done"):
            if name in message:
                setattr(self, name, message[name])


@contextmanager
def run_worker(command: Sequence[str], task: dict[str, Any]) -> Iterator[Findings]:
    """Starts a worker, waits until it has completed or failed, and yields its findings; then ends the process.

    The process is still alive inside the `with` block, because a launcher may end the job as soon as it exits.

    Args:
        command: starts `hvd_adam.doctor.worker`, here or on another host.
        task: the worker's task, written to its stdin as one line of JSON.
    """
    process = subprocess.Popen(
        command,
        text=True,
        errors="replace",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    findings = Findings()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=[process.stdout, lines], daemon=True).start()
    threading.Thread(target=findings.stderr.extend, args=[process.stderr], daemon=True).start()
    try:
        with suppress(OSError):  # the process has ended already, which `_monitor` detects
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        try:
            with _sigterm_raises():
                _monitor(process, lines, findings)
        except JobEndedError:
            findings.job_ended = True
            findings.checks.append(job_ended(findings))
        yield findings
        if findings.done:
            with suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process blocked by a dead file system cannot be killed
            process.wait(KILL_SECONDS)


def _monitor(process: subprocess.Popen[str], lines: queue.Queue[str | None], findings: Findings) -> None:
    begin, limit = time.monotonic(), LOAD_SECONDS
    while not findings.done:
        try:
            line = lines.get(timeout=max(0.0, begin + limit + SLACK - time.monotonic()))
        except queue.Empty:
            findings.overdue = True
            findings.checks.append(overdue(findings, time.monotonic() - begin))
            return
        if line is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
            time.sleep(STDERR_SECONDS)
            findings.code = process.returncode
            findings.checks.append(process_ended(findings, process.returncode))
            return
        if line.startswith(PREFIX):
            message = json.loads(line.removeprefix(PREFIX))
            findings.update(message)
            if "doing" in message:
                begin, limit = time.monotonic(), message["seconds"]


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only the first one: what remains takes a moment
        raise JobEndedError

    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is end:
            signal.signal(signal.SIGTERM, before)


def overdue(findings: Findings, seconds: float) -> Check:
    """Returns the failure of a stage that exceeded its time limit after `seconds`."""
    name, remedy = STAGES[findings.stage][0], _remedy(findings)
    if findings.stage == "arrival":
        return fail(name, f"not all ranks called MPI_Init within {seconds:.0f} s", remedy)
    return fail(name, f"not completed within {seconds:.0f} s", remedy)


def process_ended(findings: Findings, code: int | None) -> Check:
    """Returns the failure of a stage in which the worker process ended.

    Args:
        findings: the results so far.
        code: exit code of the process; negative for a signal.
    """
    name, remedy = STAGES[findings.stage][0], _remedy(findings)
    how = f"with exit code {code}"
    if code is not None and code < 0:
        how = f"by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"by signal {-code}"
    return fail(name, f"the process ended {how}{error_line(findings.stderr)}", remedy)


def _remedy(findings: Findings) -> str:
    """Returns what to do about the current stage. What can keep Horovod from starting depends on the job."""
    remedy = STAGES[findings.stage][1]
    if findings.stage != "start":
        return remedy
    causes = [_CHECK_NETWORK] if len(findings.reports) > 1 else []
    if choices := sorted(f"{name}={value}" for name, value in os.environ.items() if _CHOICES_OF_MPI.match(name)):
        causes.append(f"correct or unset {', '.join(choices)}")
    causes = causes or ["put ssh and Open MPI's programs on PATH, which MPI needs even for one process"]
    return "; ".join([*causes, remedy])


def job_ended(findings: Findings) -> Check:
    """Returns the failure of a job that SIGTERM ended before the worker had completed."""
    where = STAGES[findings.stage][0]
    if detect_launcher().size == 1:
        return fail("ranks", f"the doctor received SIGTERM while it was at: {where}", "start it again")
    found = f"the launcher ended the job while this rank was at: {where}"
    return fail("ranks", found, "read the messages of the other ranks and of the launcher")


def error_line(stderr: Sequence[str]) -> str:
    """Returns the most informative line of a library's output, in parentheses; "" if there is none."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in tuple(stderr)]
    lines = [line for line in lines if re.search(r"\w", line) and not _NO_CAUSE.search(line)]
    errors = [line for line in lines if re.search(r"error|fail|not able|cannot|unable", line, re.IGNORECASE)]
    return f" ({(errors or lines)[-1][:200]})" if lines else ""
