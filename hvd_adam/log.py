"""The "hvd_adam" logger. Rank 0 logs for all ranks; other ranks log only records that are marked with `ALL_RANKS`.

    logger.info("epoch 3 done")                         # rank 0 only, on stdout
    logger.warning("lost rank 2", extra=ALL_RANKS)      # every rank that logs it, on stderr

Commands call `setup`. Without it, records go where the application's logging configuration sends them.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Protocol, TextIO

from hvd_adam.distributed.context import current_rank
from hvd_adam.errors import UserError

logger = logging.getLogger("hvd_adam")

ALL_RANKS = {"all_ranks": True}


class ProgressBar(Protocol):
    """A progress bar that shares the terminal with the log, such as `tqdm`."""

    def clear(self) -> object:
        """Removes the bar from the terminal."""

    def refresh(self) -> object:
        """Draws the bar again."""


def is_for_this_rank(record: logging.LogRecord) -> bool:
    """Returns whether this rank prints the record: rank 0 prints all, other ranks those with `ALL_RANKS`."""
    return getattr(record, "all_ranks", False) or current_rank() == 0


class LineHandler(logging.Handler):
    """Writes each record in one write, because launchers prefix every write with the rank.

    Records below WARNING go to stdout unchanged. Others go to stderr as `hvd_adam: warning: MESSAGE`.

    Attributes:
        info_on_stderr: write records below WARNING to stderr instead; for commands that print their result.
        bar: the progress bar to clear around each line, or None.
        output_lost: whether a line could not be written, because the reader of a pipe has ended (`| head`), or the
            disk is full. A lost line does not end the command, which has other records.
    """

    def __init__(self) -> None:
        super().__init__()
        self.info_on_stderr = False
        self.bar: ProgressBar | None = None
        self.output_lost = False
        self.addFilter(is_for_this_rank)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record to the stream of its level."""
        line = self.format(record)
        is_warning = record.levelno >= logging.WARNING
        if is_warning:
            line = f"hvd_adam: {record.levelname.lower()}: {line}"
        stream = sys.stderr if is_warning or self.info_on_stderr else sys.stdout
        if self.bar is not None:
            self.bar.clear()
        self._write(stream, line)
        if self.bar is not None:
            self.bar.refresh()

    def _write(self, stream: TextIO, line: str) -> None:
        try:
            stream.write(line + "\n")
            stream.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                discard(stream)
            first, self.output_lost = not self.output_lost, True
            if first and stream is not sys.stderr:
                self._write(sys.stderr, f"hvd_adam: warning: {lost(error)}; the command continues")


def write_result(text: str) -> None:
    """Writes the result of a command to stdout.

    Raises:
        UserError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        raise UserError(lost(error)) from None


def lost(error: OSError) -> str:
    """Returns the message for an error of writing to stdout."""
    return f"cannot write to stdout ({error.strerror})"


def discard(stream: TextIO) -> None:
    """Discards what a stream still holds, and all that follows. Otherwise Python exits with code 120."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def finish() -> OSError | None:
    """Writes what stdout and stderr still hold; commands call it at their end.

    Returns:
        None, or the error by which a result is lost: lines of the log that could not be written do not count.
    """
    try:
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)
    try:
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        return None if _handler.output_lost else error
    return None


def _open_streams() -> None:
    """Opens stdin, stdout and stderr where the caller has closed them (`>&-`), and lets them take every character.

    Otherwise the next files that are opened get their numbers, and libraries print into those files. A character
    that the locale's encoding does not have, such as ≥ in Latin-1, is written as an escape sequence.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and (stream.errors == "strict" or stream.encoding != "utf-8"):
            stream.reconfigure(errors="backslashreplace")


_handler = LineHandler()


def setup(*, info_on_stderr: bool = False) -> None:
    """Makes the logger print lines to stdout and stderr; every command calls it once.

    Args:
        info_on_stderr: see `LineHandler`. A later call replaces the value.
    """
    _open_streams()
    _handler.info_on_stderr = info_on_stderr
    if _handler not in logger.handlers:
        logger.addHandler(_handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def set_progress_bar(bar: ProgressBar | None) -> None:
    """Sets the progress bar to clear around each line; None removes it."""
    _handler.bar = bar
