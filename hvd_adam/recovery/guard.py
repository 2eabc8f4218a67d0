"""`guard`: an exception on any rank of a script ends the whole job, with one error and in bounded time.

    cluster = init()
    with guard(cluster):
        ...

Without it, the ranks that wait for the failed one print Horovod's long error after the real one, and whether they
end at all depends on the launcher. Here a rank that fails asks the lowest rank that answers which error to print,
the rank with that error prints it and tells the others to exit, and no rank waits for Horovod's shutdown.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from hvd_adam.distributed.agreement import require_same
from hvd_adam.distributed.context import Cluster
from hvd_adam.distributed.launch_env import is_elastic
from hvd_adam.errors import UserError
from hvd_adam.recovery.failure import GRACE_SECONDS, Failure, leave, leave_later, stopped_by_launcher
from hvd_adam.recovery.peer_server import Request
from hvd_adam.recovery.peers import CONCURRENT_REQUESTS, Answer, Peers
from hvd_adam.recovery.preemption import stop_requested
from hvd_adam.recovery.stall_report import name_ranks
from hvd_adam.recovery.watchdog import Watchdog

SAME_ERROR_SECONDS = 1.0  # for other ranks to fail with the same error
POLL_SECONDS = 0.1
END_SECONDS = 0.3  # from the request to end until this rank exits, in which the other ranks receive it too
LONGEST_SECONDS = 60.0  # from an exception to the end of its rank, whatever the other ranks do
REMEDY = "If the job was only slow, give guard a longer stall_timeout, or call beat() more often"


def guard(cluster: Cluster, *, stall_timeout: float | None = None) -> Guard:
    """Ends the whole job, with one error, when the block raises an exception on any rank.

    Enter it directly after `init`, on every rank; the start of the block is a collective, its end is not. If the
    block ends without an exception, nothing of it remains. It can be used again.

    On an exception, one rank prints its traceback and where it occurred. An error that several ranks raise within
    a second is printed by the lowest of them. Ranks that wait in a collective, and those whose collective fails
    because of the first exception, exit without an error of their own. The exit code is 1 on all ranks.

    Some exceptions are printed in one line, or not at all: `UserError` (exit code 2), `JobError` (1), `Preempted`
    (75), `KeyboardInterrupt` (130) and `sys.exit` with another code than 0. On several ranks, no `finally` block
    or `atexit` function outside the block runs after an exception. On one rank, other exceptions pass unchanged.

    Args:
        cluster: this process.
        stall_timeout: seconds without progress after which the job ends with exit code 1 and a report of what
            every rank is doing; None for no limit. A step of any optimizer is progress, and so is `beat`. The
            limit is at least 600 s until the first step has ended. Identical on all ranks. With MPI, Horovod ends
            a stalled job without a report after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS, 600 by default.

    Returns:
        The context manager. Its value in the `with` statement has a method `beat(doing)`, which records progress
        in a part of the program without optimizer steps.

    Raises:
        UserError: `stall_timeout` is not above 0, or the launcher is elastic: it restarts ranks, which `guard`
            would end.

    Example:
        >>> with guard(init(), stall_timeout=300) as progress:
        ...     progress.beat("the evaluation")
    """
    if stall_timeout is not None and not stall_timeout > 0:
        raise UserError(f"stall_timeout is {stall_timeout!r}: use seconds above 0, or None for no limit")
    if is_elastic():
        raise UserError(
            "guard ends all ranks when one fails, but this launcher restarts them: start the script without "
            "--min-np and --host-discovery-script, or leave guard out"
        )
    return Guard(cluster, stall_timeout)


class Guard:
    """The context manager that `guard` returns."""

    def __init__(self, cluster: Cluster, stall_timeout: float | None) -> None:
        self._cluster, self._stall_timeout = cluster, stall_timeout
        self._process = os.getpid()
        self._judge = Judge(cluster.size)
        self._peers: Peers | None = None
        self._watchdog: Watchdog | None = None
        self._remove_hook: Callable[[], None] | None = None

    def __enter__(self) -> Guard:
        self._judge = Judge(self._cluster.size)
        try:
            if self._cluster.size > 1:
                self._peers = Peers(self._cluster, self._answer, "hvd_adam.guard")
                require_same(self._cluster, "options of guard", {"stall_timeout": self._stall_timeout})
            if self._stall_timeout is not None:
                self._watch(self._stall_timeout)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if os.getpid() != self._process:  # a child that was forked in the block, such as a DataLoader's worker
            return
        succeeded = error is None or isinstance(error, GeneratorExit)
        if succeeded or (isinstance(error, SystemExit) and not error.code):
            self._close()
        elif error is not None:
            self._end(error)

    def beat(self, doing: str) -> None:
        """Records progress.

        Args:
            doing: what this rank starts to do, for the report.
        """
        if self._watchdog is not None:
            self._watchdog.beat(doing)

    def _watch(self, timeout: float) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook  # here: commands import this module

        self._watchdog = Watchdog(self._cluster, timeout, REMEDY)
        self._remove_hook = register_optimizer_step_post_hook(self._after_step).remove

    def _after_step(self, *_: object) -> None:
        self.beat("the last optimizer step")

    def _close(self) -> None:
        self._stop_watching()
        if self._peers is not None:
            self._peers.close()
            self._peers = None

    def _stop_watching(self) -> None:
        if self._remove_hook is not None:
            self._remove_hook()
        if self._watchdog is not None:
            self._watchdog.close()
        self._remove_hook = self._watchdog = None

    def _end(self, error: BaseException) -> None:
        """Prints the error once for the job and exits; on one rank an error that is not expected passes."""
        failure = Failure.of(error)
        self._stop_watching()
        if self._cluster.size > 1:
            self._end_job(failure, script_line(error))
        self._close()
        if not failure.traceback and not isinstance(error, SystemExit):
            if failure.line:
                print(f"{script_line(error)}: {failure.line}", file=sys.stderr, flush=True)
            raise SystemExit(failure.code) from None

    def _end_job(self, failure: Failure, script: str) -> NoReturn:
        leave_later(failure.code, LONGEST_SECONDS)
        verdict = self._verdict(failure)
        if verdict["ranks"][0] == self._cluster.rank:
            sys.stderr.write(self._text(failure, script, verdict))
            sys.stderr.flush()
            silence()
            self._ask_others("end", code=failure.code)
        else:
            stopped_by_launcher(GRACE_SECONDS)  # or by that rank
        leave(failure)

    def _text(self, failure: Failure, script: str, verdict: Answer) -> str:
        """Returns the error of the ranks in the verdict, which failed in the same way."""
        ranks, size = verdict["ranks"], self._cluster.size
        where = name_ranks(ranks, self._hosts())
        if failure.lost_ranks and verdict["reported"] < size:
            line = failure.lost_ranks
            silent = [rank for rank, answer in self._ask_others("alive").items() if answer is None]
            if silent:
                line += f"; {name_ranks(silent, self._hosts())} has ended or does not answer"
            return f"{script}: {where} {line}\n"
        if failure.traceback:
            return f"{failure.traceback}{script}: {where} {failure.line}\n"
        if failure.line:
            return f"{script}: {failure.line}{'' if len(ranks) == size else f' [{where}]'}\n"
        if len(ranks) == size or failure.code in (75, 130):
            return ""
        return f"{script}: {where} exited with code {failure.code} while the other ranks were running\n"

    # Which rank prints its error.

    def _verdict(self, failure: Failure) -> Answer:
        """Asks the lowest rank that answers until it has decided."""
        signature = "lost" if failure.lost_ranks else hashlib.sha256(repr(failure).encode()).hexdigest()
        report: dict[str, Any] = {
            "rank": self._cluster.rank,
            "signature": signature,
            "weak": bool(failure.lost_ranks) or not failure.line,
        }
        stopping, judge = stop_requested(), self._lowest_answering()
        while True:
            if judge == self._cluster.rank or self._peers is None:
                answer: Answer | None = self._judge.decide(**report)
            else:
                answer = self._peers.ask(judge, what="failed", **report)
            if answer is None:
                judge = self._lowest_answering()
            elif answer["ranks"]:
                return answer
            elif failure.lost_ranks and stop_requested() and not stopping:
                leave(failure)  # the launcher, which stops this rank, names the one that ended
            else:
                time.sleep(POLL_SECONDS)

    def _lowest_answering(self) -> int:
        if self._peers is None:
            return self._cluster.rank
        lower = range(min(self._cluster.rank, CONCURRENT_REQUESTS))
        answers = self._peers.ask_all(lower, what="alive")
        return min((rank for rank, answer in answers.items() if answer is not None), default=self._cluster.rank)

    def _ask_others(self, what: str, **request: object) -> dict[int, Answer | None]:
        """Asks all other ranks, the highest first."""
        if self._peers is None:
            return {}
        others = [rank for rank in reversed(range(self._cluster.size)) if rank != self._cluster.rank]
        return self._peers.ask_all(others, what=what, **request)

    def _hosts(self) -> list[str]:
        return [socket.gethostname()] * self._cluster.size if self._peers is None else self._peers.hosts

    def _answer(self, request: Request) -> Answer:
        """Answers another rank, in a thread of its own."""
        if request["what"] == "failed":
            return self._judge.decide(request["rank"], request["signature"], request["weak"])
        if request["what"] == "end":
            silence()
            timer = threading.Timer(END_SECONDS, leave, [Failure(request["code"])])
            timer.daemon = True
            timer.start()
        return {}


class Judge:
    """Decides whose error is printed: the first one, by the lowest of the ranks that raise it within a second.

    Args:
        size: number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._reports: dict[int, tuple[str, bool]] = {}  # signature and whether it is weak, in order of arrival
        self._deadline: dict[bool, float] = {}  # by whether only weak ones have arrived
        self._decided: list[int] = []

    def decide(self, rank: int, signature: str, weak: bool) -> Answer:
        """Takes a rank's report, which may be repeated.

        Args:
            rank: of the report.
            signature: equal for ranks that raise the same error.
            weak: whether another rank is likely to have a better error: this one has lost the connection, or exits
                without an error.

        Returns:
            "ranks": those that have the error that is printed, of which the first prints it; empty until that is
            decided. "reported": the number of ranks that have failed.
        """
        with self._lock:
            now = time.monotonic()
            self._reports.setdefault(rank, (signature, weak))
            self._deadline.setdefault(weak, now + (GRACE_SECONDS if weak else SAME_ERROR_SECONDS))
            all_weak = False not in self._deadline
            over = len(self._reports) == self._size or now >= self._deadline[all_weak]
            if over and not self._decided:
                chosen = {rank: sign for rank, (sign, is_weak) in self._reports.items() if is_weak == all_weak}
                first = next(iter(chosen.values()))
                self._decided = sorted(rank for rank, sign in chosen.items() if sign == first)
            return {"ranks": self._decided, "reported": len(self._reports)}


def silence() -> None:
    """Closes stderr to Horovod, whose threads report each rank that exits before this one."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def script_line(error: BaseException) -> str:
    """Returns the innermost line of the user's program in a traceback, as FILE:LINE; else the program's name."""
    package = str(Path(__file__).parents[1])
    own = [
        f"{os.path.basename(frame.f_code.co_filename)}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith(package)
        and str(frame.f_globals.get("__name__")).partition(".")[0] not in ("horovod", "torch", "contextlib")
    ]
    return own[-1] if own else os.path.basename(sys.argv[0])
