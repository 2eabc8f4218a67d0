"""The "hvd_adam" logger. Rank 0 logs for all ranks; other ranks log only records that are marked with `ALL_RANKS`.

    logger.info("epoch 3 done")                         # rank 0 only, on stdout
    logger.warning("lost rank 2", extra=ALL_RANKS)      # every rank that logs it, on stderr

Commands call `setup`. Without it, records go where the application's logging configuration sends them.
"""

from __future__ import annotations

import logging
import sys
from typing import Protocol

from hvd_adam.distributed.context import current_rank

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
    """

    def __init__(self) -> None:
        super().__init__()
        self.info_on_stderr = False
        self.bar: ProgressBar | None = None
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
        stream.write(line + "\n")
        stream.flush()
        if self.bar is not None:
            self.bar.refresh()


_handler = LineHandler()


def setup(*, info_on_stderr: bool = False) -> None:
    """Makes the logger print lines to stdout and stderr; every command calls it once.

    Args:
        info_on_stderr: see `LineHandler`. A later call replaces the value.
    """
    _handler.info_on_stderr = info_on_stderr
    if _handler not in logger.handlers:
        logger.addHandler(_handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def set_progress_bar(bar: ProgressBar | None) -> None:
    """Sets the progress bar to clear around each line; None removes it."""
    _handler.bar = bar
