"""Processes of this machine, as Linux shows them under /proc: which there are, and signals to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def marked(mark: str) -> list[int]:
    """Every live process of this user that was started with `mark` ("NAME=value") in its environment."""
    return [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if mark.encode() in _environ(entry)]


def is_stopped(process: int) -> bool:
    """Whether a process has been stopped, or has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"
    except OSError:
        return True


def send(process: int, number: int) -> None:
    """Sends a signal to a process, which may have ended by itself."""
    with suppress(ProcessLookupError):
        os.kill(process, number)


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Notes Ctrl-C and SIGTERM, and is interrupted at the end if not before.

    Elsewhere the interrupt might come between a process's start and the moment from which it is known.
    """
    told = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: told.set()) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told.is_set():
        raise KeyboardInterrupt


def _environ(entry: Path) -> list[bytes]:
    try:
        return (entry / "environ").read_bytes().split(b"\0")
    except OSError:
        return []  # it has ended, or is another user's
