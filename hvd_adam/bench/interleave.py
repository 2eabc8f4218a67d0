"""Interleaves the turns of several variants, each a group of ranks: one runs while all others are stopped.

    outcomes = take_turns([Plan("a", task, command), …], ranks=2, rounds=5, timeout=120, log=print)

Every variant is started once, warms up, and is stopped with SIGSTOP, so that not even its background threads use a
core during the turns of others. The order A B C A B C … then costs no more than A A B B C C …, and a slow phase of
the machine affects all variants. The launcher and the ranks communicate by files, which are renamed into place:

    task.json            the task of the ranks, read by `hvd_adam.bench.worker`
    pid.RANK             process id of a rank
    ready.RANK           the rank has warmed up
    turn.NUMBER          asks the ranks to measure
    times.NUMBER.RANK    the measured times
    end                  asks the ranks to exit
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_adam.bench.processes import deferred_signals, is_stopped, marked, send
from hvd_adam.bench.stats import slowest

# In the environment of every process of a group, so that all can be found: launchers give ranks process groups and
# sessions of their own.
MARK = "HVD_ADAM_BENCH_GROUP"

Times = dict[str, list[float]]
Measure = Callable[[], Times]
Log = Callable[[str], object]

_POLL_SECONDS = 0.002
_EXIT_SECONDS = 10.0
_KILL_SECONDS = 3.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class Plan:
    """How to run one variant.

    Attributes:
        name: unique among the plans.
        task: JSON values that the ranks read.
        command: starts all ranks; the group's directory is appended to it.
        environ: variables added to the environment.
    """

    name: str
    task: Mapping[str, Any]
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """The result of a variant.

    Attributes:
        times: by name of the measurement, the values of all turns; each is the slowest rank's.
        error: why the variant failed, or None.
    """

    times: Times = field(default_factory=dict)
    error: str | None = None


class GroupError(Exception):
    """A group ended, or did not answer in time. The message contains the end of its output."""


def take_turns(plans: Sequence[Plan], *, ranks: int, rounds: int, timeout: float, log: Log) -> dict[str, Outcome]:
    """Starts every variant, runs one turn of each in every round, and ends all of them, also on errors.

    Args:
        plans: the variants, in the order of their turns.
        ranks: number of processes of each.
        rounds: number of turns of each.
        timeout: time limit in seconds of a variant's start and warm-up, and of each turn.
        log: called with progress messages.
    """
    outcomes = {plan.name: Outcome() for plan in plans}
    with (
        deferred_signals() as interrupted,
        tempfile.TemporaryDirectory(prefix="hvd_adam-bench-") as folder,
    ):
        groups = [
            Group(plan, Path(folder, str(index)), ranks, timeout, interrupted) for index, plan in enumerate(plans)
        ]
        try:
            for group in groups:
                log(f"starting {group.plan.name}")
                _attempt(group, outcomes, group.start, log)
            for number in range(rounds):
                log(f"round {number + 1} of {rounds}")
                for group in groups:
                    if outcomes[group.plan.name].error is None:
                        _attempt(group, outcomes, group.turn, log)
        finally:
            _end(groups)
    return outcomes


def _attempt(group: Group, outcomes: dict[str, Outcome], action: Callable[[], Times], log: Log) -> None:
    outcome = outcomes[group.plan.name]
    try:
        for key, values in action().items():
            outcome.times.setdefault(key, []).extend(values)
    except GroupError as error:
        outcome.error = f"{group.plan.name} {error}"
        log(outcome.error)
        group.kill()


def _end(groups: Sequence[Group]) -> None:
    """Asks all groups to exit, so that MPI can clean up, and kills those that do not."""
    for group in groups:
        group.request_exit()
    deadline = time.monotonic() + _EXIT_SECONDS
    while time.monotonic() < deadline and any(group.processes() for group in groups):
        time.sleep(0.05)
    for group in groups:
        group.kill()


class Group:
    """The ranks of one variant.

    Args:
        plan: how to run them.
        folder: directory for their files; created by `start`.
        ranks: number of processes.
        timeout: time limit in seconds of each wait for them.
        interrupted: once set, waiting raises KeyboardInterrupt.
    """

    def __init__(self, plan: Plan, folder: Path, ranks: int, timeout: float, interrupted: threading.Event) -> None:
        self.plan = plan
        self._folder = folder
        self._ranks = range(ranks)
        self._timeout = timeout
        self._interrupted = interrupted
        self._turns = 0
        self._ready = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Times:
        """Starts the ranks and stops them when they have warmed up; measures nothing."""
        self._folder.mkdir()
        write(self._folder / "task.json", self.plan.task)
        environ = {**os.environ, **self.plan.environ, MARK: str(self._folder)}
        with (self._folder / "output").open("wb") as output:
            try:
                self._process = subprocess.Popen(
                    [*self.plan.command, str(self._folder)],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the terminal must not send Ctrl-C to it: a stopped rank cannot react
                )
            except OSError as error:
                raise GroupError(f"cannot be started: {error}") from error
        self._await("ready")
        self._ready = True
        self._stop()
        return {}

    def turn(self) -> Times:
        """Continues the ranks, lets them measure, and stops them again."""
        self._turns += 1
        write(self._folder / f"turn.{self._turns}", None)
        self._signal(signal.SIGCONT)
        reports = self._await(f"times.{self._turns}")
        self._stop()
        return {key: slowest(report[key] for report in reports) for key in reports[0]}

    def request_exit(self) -> None:
        """Asks the ranks to exit; kills ranks that have not warmed up, which do not poll for the request."""
        if self._process is not None and self._ready:
            write(self._folder / "end", None)
            self._signal(signal.SIGCONT)
        else:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the group with SIGTERM, then with SIGKILL."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The launcher ends and cleans up after its ranks only if they are not stopped.
            for process in self.processes():
                send(process, signal.SIGCONT)
                send(process, number)
            deadline = time.monotonic() + _KILL_SECONDS
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.02)
        self._process.wait()
        self._process = None

    def processes(self) -> list[int]:
        """Returns every live process that this group has started, directly or indirectly."""
        if self._process is None:
            return []
        found = {*marked(f"{MARK}={self._folder}")}
        if self._process.poll() is None:  # also reaps it if it has ended
            found.add(self._process.pid)  # its environment cannot be read yet if it has just been started
        return sorted(found)

    def _await(self, name: str) -> list[Any]:
        """Returns what the ranks have written into their files of this name.

        Raises:
            GroupError: the launcher has ended, or the time limit has passed.
            KeyboardInterrupt: the benchmark was interrupted.
        """
        files = [self._folder / f"{name}.{rank}" for rank in self._ranks]
        deadline = time.monotonic() + self._timeout
        assert self._process is not None
        while True:
            code = self._process.poll()  # before the files: a rank may write its file and then end
            if all(file.exists() for file in files):
                return [json.loads(file.read_text()) for file in files]
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            if code is not None:
                raise GroupError(f"ended with code {code}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GroupError(f"did not answer within {self._timeout:g} seconds:\n{self._tail()}")
            time.sleep(0.01)

    def _stop(self) -> None:
        """Stops the ranks and waits until they have stopped: on a busy machine a signal takes effect late."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + self._timeout
        while not all(map(is_stopped, self._pids())) and time.monotonic() < deadline:
            time.sleep(0.001)

    def _signal(self, number: int) -> None:
        for pid in self._pids():
            send(pid, number)

    def _pids(self) -> list[int]:
        return [int(file.read_text()) for file in self._folder.glob("pid.*")]

    def _tail(self) -> str:
        lines = (self._folder / "output").read_text(errors="replace").strip().splitlines()
        return "\n".join(f"    {line}" for line in lines[-_TAIL_LINES:]) or "    (no output)"


def serve(folder: Path, rank: int, prepare: Callable[[], Measure]) -> None:
    """Runs a rank: prepares, warms up with one unreported measurement, and measures at each turn."""
    write(folder / f"pid.{rank}", os.getpid())
    measure = prepare()
    measure()
    write(folder / f"ready.{rank}", None)
    turn = 1
    while not (folder / "end").exists():
        if (folder / f"turn.{turn}").exists():
            write(folder / f"times.{turn}.{rank}", measure())
            turn += 1
        time.sleep(_POLL_SECONDS)


def write(path: Path, value: object) -> None:
    """Writes JSON into a file atomically."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)
