"""The processes in which Horovod starts ranks and scripts, and their handling of signals.

With the Gloo controller, horovodrun starts a helper process for each rank, and elastic horovodrun one for each run
of the discovery script (safe_shell_exec.py of Horovod 0.28.1). A helper imports the main module of horovodrun, and
with it this one.
"""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from horovod.runner.common.util import safe_shell_exec

POLL_SECONDS = 0.02

# In which ranks may write a checkpoint after a signal to horovodrun. Horovod's own limit is 5, also for ranks that
# are ended because another has failed, where it remains.
SAVE_SECONDS = 60
EXIT_SECONDS = 1  # of a shell whose rank has exited

_grace_seconds = safe_shell_exec.GRACEFUL_TERMINATION_TIME_S  # in a helper: until its rank is killed
_helpers: list[int] = []  # process numbers

_setsid = os.setsid
_terminate_executor_shell_and_children = safe_shell_exec.terminate_executor_shell_and_children
_psutil_wait: Callable[..., int | None] = psutil.Process.wait


def patch(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replaces a function of a module or a method of a class."""
    setattr(owner, name, replacement)


def wait_without_reaping(process: psutil.Process, timeout: float | None = None) -> int | None:
    """Replaces psutil.Process.wait, which reaps a child and so hides its exit code from the parent's own wait.

    Horovod's helper process waits this way for a rank that it terminates: Popen.wait then returns 0, and the job
    seems to have succeeded.
    """
    start = time.monotonic()
    try:
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if timeout is not None and time.monotonic() - start > timeout:
                raise psutil.TimeoutExpired(timeout, process.pid)
            time.sleep(POLL_SECONDS)
    except ChildProcessError:  # not a child of this process
        return _psutil_wait(process, timeout)
    return None


def start_helpers_with_signals_blocked() -> None:
    """Keeps Ctrl-C from Horovod's helper processes until they have left the terminal's process group.

    A helper imports this module first, which takes a second, and would print a traceback. SIGUSR1, which
    `signal_helpers` sends, waits until it has a handler.
    """
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_blocked(path: Any, arguments: Any, *descriptors: Any) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
        try:
            process = spawn(path, arguments, *descriptors)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if any(os.fsdecode(argument) == "--multiprocessing-fork" for argument in arguments):
            _helpers.append(process)  # others are the resource tracker of multiprocessing
        return process

    patch(multiprocessing.util, "spawnv_passfds", spawn_blocked)


def signal_helpers() -> None:
    """Sends SIGUSR1 to Horovod's helper processes, before Horovod has them end their ranks."""
    for process in _helpers:
        with suppress(psutil.Error):
            helper = psutil.Process(process)
            if helper.ppid() == os.getpid():  # it has not ended, and its number is not another process's
                helper.send_signal(signal.SIGUSR1)


def end_rank_later(*_: object) -> None:
    """Handles SIGUSR1 in a helper: its rank may write a checkpoint. A second one ends the rank at once."""
    global _grace_seconds
    if _grace_seconds == SAVE_SECONDS:
        for shell in psutil.Process().children():
            _terminate_rank(shell)  # which has received a SIGTERM already
    _grace_seconds = SAVE_SECONDS


def _terminate_rank(shell: psutil.Process) -> list[psutil.Process]:
    """Sends SIGTERM to what a shell has started: a rank, or ssh. Returns these processes."""
    ranks: list[psutil.Process] = []
    with suppress(psutil.Error):
        ranks = shell.children()
        for rank in ranks:
            rank.terminate()
    return ranks


def end_rank(shell_number: int) -> None:
    """Replaces terminate_executor_shell_and_children in a helper, so that the shell exits with the rank's code.

    Horovod ends the shell as soon as the rank is gone. If the shell has not exited by then, the job's code is that
    of SIGTERM, not the rank's.
    """
    with suppress(psutil.Error):
        shell = psutil.Process(shell_number)
        ranks = alive = _terminate_rank(shell)
        start = time.monotonic()
        while alive and time.monotonic() - start < _grace_seconds:  # SIGUSR1 may come meanwhile, on a busy machine
            _, alive = psutil.wait_procs(alive, timeout=EXIT_SECONDS)
        if not alive:
            shell.wait(timeout=_grace_seconds if ranks else EXIT_SECONDS)
            return
    safe_shell_exec.GRACEFUL_TERMINATION_TIME_S = 0  # it has passed
    _terminate_executor_shell_and_children(shell_number)


def setsid_and_unblock() -> None:
    """Replaces os.setsid in a helper, before it starts a rank: drops a pending SIGINT and takes the next ones."""
    _setsid()
    # At its end Python restores the default, with which a late signal would replace the exit code by its own.
    atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, end_rank_later)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGUSR1})
    signal.signal(signal.SIGINT, signal.default_int_handler)


def patch_helper() -> None:
    """Changes Horovod in a helper."""
    patch(os, "setsid", setsid_and_unblock)
    patch(safe_shell_exec, "terminate_executor_shell_and_children", end_rank)
