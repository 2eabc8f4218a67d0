"""How an exception ends a process: what to print and the exit code, for commands and for scripts under `guard`.

Exit codes: 2 bad input (one line, no traceback); 75 stopped early after a checkpoint (EX_TEMPFAIL of sysexits.h:
try again); 130 interrupted by Ctrl-C, for a training after a checkpoint; 1 any other error. Imports no torch.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from hvd_adam.errors import JobError, Preempted, UserError
from hvd_adam.recovery.preemption import interrupted, stop_requested
from hvd_adam.text import printable

# The launcher ends the other ranks once one has exited. They print their errors too if it has not by then.
GRACE_SECONDS = 8.0  # on a busy machine horovodrun --gloo takes more than 3
LONGEST_REASON = 400  # characters of the error
FLUSH_SECONDS = 5.0  # for output that nobody reads, and Horovod's shutdown


@dataclass(frozen=True)
class Failure:
    """An exception that ends a process.

    Attributes:
        code: the exit code.
        line: the error in one line, without the program's name; empty if there is nothing to print.
        traceback: the traceback of an error that is not expected, else empty.
        lost_ranks: "lost the other ranks…" in one line if Horovod ended a collective, most likely because another
            rank has ended; else empty.
        agreed: whether all ranks end at this point, for the same reason.
    """

    code: int
    line: str = ""
    traceback: str = ""
    lost_ranks: str = ""
    agreed: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Returns the failure that an exception is; `sys.exit` with a text prints it, as in Python."""
        if isinstance(error, UserError):
            return cls(2, f"error: {printable(str(error))}")
        if isinstance(error, JobError):
            return cls(1, f"error: {printable(str(error))}")
        if isinstance(error, Preempted):
            return cls(130 if interrupted() else 75, agreed=True)
        if isinstance(error, KeyboardInterrupt):
            return cls(130, "interrupted")
        if isinstance(error, SystemExit):
            return cls(error.code or 0) if isinstance(error.code, int | None) else cls(1, str(error.code))
        text = "".join(traceback.format_exception(error))
        root, lost_ranks = _root(error), ""
        if type(root).__name__ == "HorovodInternalError":
            reason = str(error if type(error) is type(root) else root).partition(" (Horovod:")[0]
            lost_ranks = f"lost the other ranks: {textwrap.shorten(reason, LONGEST_REASON)}"
        return cls(1, f"failed: {error!r}", text, lost_ranks)


def _root(error: BaseException) -> BaseException:
    """Returns the exception that led to this one; Horovod's own instead of the RuntimeError that it replaces."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    is_horovods = type(error).__name__ == "HorovodInternalError" and type(cause) is RuntimeError
    return error if cause is None or is_horovods else _root(cause)


def stopped_by_launcher(seconds: float, starting: bool = False) -> bool:
    """Waits for the launcher to stop this rank, as it does once another rank has printed the error and exited.

    A signal that came before is a request to stop the job, unless this rank is still starting: then rank 0, which
    started faster, has printed the error already.

    Args:
        seconds: how long to wait.
        starting: whether this rank has not started its work.
    """
    before, end = stop_requested() and not starting, time.monotonic() + seconds
    while time.monotonic() < end:
        if stop_requested() and not before:
            return True
        time.sleep(0.05)
    return False


def leave_later(code: int, seconds: float) -> None:
    """Ends the process at once after this time, unless it has ended by then."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()


def leave(failure: Failure) -> NoReturn:
    """Exits at once: Horovod's shutdown would wait for ranks that are stuck in a collective.

    Where all ranks end, Horovod is shut down first. Its thread on a rank that exits later would report the
    connections that this exit closes.
    """
    leave_later(failure.code, FLUSH_SECONDS)
    horovod = sys.modules.get("horovod.torch")
    if failure.agreed and horovod is not None:
        horovod.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(failure.code)
