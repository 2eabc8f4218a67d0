"""The "hvd_adam" logger: rank 0 speaks for all ranks, unless a record is marked as one rank's own.

    logger.info("epoch 3 done")                         # rank 0 only, on stdout
    logger.warning("lost rank 2", extra=ALL_RANKS)      # every rank that logs it, on stderr

Without `setup`, which the commands call, records go where the application's logging configuration sends them.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from hvd_adam.distributed.context import current_rank

logger = logging.getLogger("hvd_adam")

ALL_RANKS = {"all_ranks": True}


def is_for_this_rank(record: logging.LogRecord) -> bool:
    """Whether this rank prints the record: rank 0 prints all, other ranks what was logged with `ALL_RANKS`."""
    return getattr(record, "all_ranks", False) or current_rank() == 0


class LineHandler(logging.Handler):
    """Writes each record in one write, so that launchers, which tag every write with the rank, tag it once.

    Records below WARNING go to stdout as they are; others to stderr, with the name of the project in front.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record to the stream of its level."""
        line = self.format(record)
        if record.levelno >= logging.WARNING:
            _write(sys.stderr, f"hvd_adam: {line}\n")
        else:
            _write(sys.stdout, f"{line}\n")


def setup() -> None:
    """Makes the logger print lines for the person who watches; called once by each command."""
    if not any(isinstance(handler, LineHandler) for handler in logger.handlers):
        handler = LineHandler()
        handler.addFilter(is_for_this_rank)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
