"""Turn taking: variants run as groups of ranks side by side, but only one at a time is awake.

    outcomes = take_turns([Plan("a", task, command), …], ranks=2, rounds=5, timeout=120, say=print)

Every variant is started once, warms up, and is stopped by SIGSTOP, so that not even its background threads
take a core from the one whose turn it is. That makes A B C A B C … as cheap as A A B B C C …, and a machine
that becomes slower for a while is slower for all. What both sides tell each other are files, renamed into place:

    task.json            what the ranks are to do, for `hvd_adam.bench.worker`
    pid.RANK             a rank's process
    ready.RANK           it has warmed up
    turn.NUMBER          it is to measure
    times.NUMBER.RANK    what it has measured
    end                  it is to leave
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

# In the environment of everything that a group starts, so that nothing of it can be lost sight of: a launcher
# puts its ranks into process groups and sessions of their own.
MARK = "HVD_ADAM_BENCH_GROUP"

Times = dict[str, list[float]]
Measure = Callable[[], Times]

_POLL_SECONDS = 0.002
_LEAVE_SECONDS = 10.0
_KILL_SECONDS = 3.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class Plan:
    """One variant.

    Attributes:
        name: unique among the plans.
        task: what the ranks read, of JSON's types.
        command: starts all its ranks; the group's folder is appended to it.
        environ: is added to the environment.
    """

    name: str
    task: Mapping[str, Any]
    command: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a variant.

    Attributes:
        times: what its turns measured, by what was measured: of each value the slowest rank's.
        error: why it was given up, or None.
    """

    times: Times = field(default_factory=dict)
    error: str | None = None


class GroupError(Exception):
    """A group died, or did not answer in time; the message says so with the end of its output."""


def take_turns(
    plans: Sequence[Plan], *, ranks: int, rounds: int, timeout: float, say: Callable[[str], None]
) -> dict[str, Outcome]:
    """Starts every variant, gives each a turn in every round, and ends all of them whatever happens.

    Args:
        plans: the variants, in the order of their turns.
        ranks: how many processes each of them has.
        rounds: turns for each.
        timeout: seconds that a variant may take to start and warm up, and for each turn; then it is given up.
        say: is told of progress.
    """
    outcomes = {plan.name: Outcome() for plan in plans}
    with deferred_signals() as told, tempfile.TemporaryDirectory(prefix="hvd_adam-bench-") as folder:
        groups = [Group(plan, Path(folder, str(index)), ranks, timeout, told) for index, plan in enumerate(plans)]
        try:
            for group in groups:
                say(f"starting {group.plan.name}")
                _attempt(group, outcomes, group.start, say)
            for number in range(rounds):
                say(f"round {number + 1} of {rounds}")
                for group in groups:
                    if outcomes[group.plan.name].error is None:
                        _attempt(group, outcomes, group.turn, say)
        finally:
            _end(groups)
    return outcomes


def _attempt(
    group: Group, outcomes: dict[str, Outcome], action: Callable[[], Times], say: Callable[[str], None]
) -> None:
    outcome = outcomes[group.plan.name]
    try:
        for key, values in action().items():
            outcome.times.setdefault(key, []).extend(values)
    except GroupError as error:
        outcome.error = f"{group.plan.name} {error}"
        say(outcome.error)
        group.kill()


def _end(groups: Sequence[Group]) -> None:
    """Lets groups leave by themselves, that MPI may clear up after itself; what stays is killed."""
    for group in groups:
        group.dismiss()
    deadline = time.monotonic() + _LEAVE_SECONDS
    while time.monotonic() < deadline and any(group.processes() for group in groups):
        time.sleep(0.05)
    for group in groups:
        group.kill()


class Group:
    """The ranks of one variant.

    Args:
        plan: what they are and do.
        folder: for their files; is made.
        ranks: how many.
        timeout: seconds to wait for them at most.
        told: set when to wait no longer, but to raise KeyboardInterrupt.
    """

    def __init__(self, plan: Plan, folder: Path, ranks: int, timeout: float, told: threading.Event) -> None:
        self.plan = plan
        self._folder = folder
        self._ranks = range(ranks)
        self._timeout = timeout
        self._told = told
        self._turns = 0
        self._ready = False
        self._process: subprocess.Popen | None = None

    def start(self) -> Times:
        """Starts the ranks, and stops them once they have warmed up; measures nothing."""
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
                    start_new_session=True,  # Ctrl-C is ours to pass on: stopped ranks would not hear it
                )
            except OSError as error:
                raise GroupError(f"cannot be started: {error}") from error
        self._await("ready")
        self._ready = True
        self._stop()
        return {}

    def turn(self) -> Times:
        """Wakes the ranks, lets them measure, and stops them again."""
        self._turns += 1
        write(self._folder / f"turn.{self._turns}", None)
        self._signal(signal.SIGCONT)
        reports = self._await(f"times.{self._turns}")
        self._stop()
        return {key: slowest(report[key] for report in reports) for key in reports[0]}

    def dismiss(self) -> None:
        """Tells the ranks to leave; those that have not warmed up would not hear it, and are killed."""
        if self._process is not None and self._ready:
            write(self._folder / "end", None)
            self._signal(signal.SIGCONT)
        else:
            self.kill()

    def kill(self) -> None:
        """Ends every process of the group, at once where it does not end by itself."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The launcher hears of the end, and clears up after its ranks, only if they are awake.
            for process in self.processes():
                send(process, signal.SIGCONT)
                send(process, number)
            deadline = time.monotonic() + _KILL_SECONDS
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.02)
        self._process.wait()
        self._process = None

    def processes(self) -> list[int]:
        """Every live process that this group has started, at any remove."""
        if self._process is None:
            return []
        self._process.poll()  # it would stay a zombie
        return marked(f"{MARK}={self._folder}")

    def _await(self, name: str) -> list[Any]:
        """What every rank has written into its file of this name.

        Raises:
            GroupError: the launcher has ended, or the time is over.
            KeyboardInterrupt: the benchmark was told to end.
        """
        files = [self._folder / f"{name}.{rank}" for rank in self._ranks]
        deadline = time.monotonic() + self._timeout
        assert self._process is not None
        while True:
            ended = self._process.poll()  # first: what was written before the end counts
            if all(file.exists() for file in files):
                return [json.loads(file.read_text()) for file in files]
            if self._told.is_set():
                raise KeyboardInterrupt
            if ended is not None:
                raise GroupError(f"ended with code {ended}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GroupError(f"did not answer within {self._timeout:g} seconds:\n{self._tail()}")
            time.sleep(0.01)

    def _stop(self) -> None:
        """Stops the ranks, and waits until they are: on a busy machine a signal takes its time."""
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
    """What a rank does: prepares itself, warms up by a turn that does not count, measures at each turn."""
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
    """Writes JSON into a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value))
    temporary.rename(path)
