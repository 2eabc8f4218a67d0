"""Finds processes of this machine, and sends signals to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def marked(mark: str) -> list[int]:
    """Returns the live processes of this user that were started with "NAME=value" in their environment."""
    name, _, value = mark.partition("=")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            if process.environ().get(name) == value:
                found.append(process.pid)
    return found


def is_stopped(process: int) -> bool:
    """Returns whether a process is stopped or has ended."""
    try:
        return psutil.Process(process).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def send(process: int, number: int) -> None:
    """Sends a signal to a process, which may have ended already."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Sets the yielded event on SIGINT and SIGTERM, and raises KeyboardInterrupt at the end of the block.

    An immediate KeyboardInterrupt could lose a process between its start and the moment where its id is stored.
    """
    interrupted = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: interrupted.set()) for number in numbers}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted.is_set():
        raise KeyboardInterrupt
