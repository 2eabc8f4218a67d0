"""`UnreadableSamples`: the samples that a rank could not read, each logged once, up to a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from hvd_adam.errors import UserError

_logger = logging.getLogger("hvd_adam")
_EVERY_RANK = {"all_ranks": True}  # as hvd_adam.log.ALL_RANKS


class UnreadableSamples:
    """Logs each unreadable sample once and ends the run above a limit.

    A rank counts the samples that it met itself: no rank waits for another.

    Args:
        limit: how many different samples are tolerated, ≥ 0.
        option: that sets the limit, for the message.

    Attributes:
        limit: as given.
        messages: those of the samples so far, each with its path and the reason.
    """

    def __init__(self, limit: int, option: str = "--max-corrupt") -> None:
        self.limit, self._option = limit, option
        self.messages: list[str] = []

    def add(self, messages: Iterable[str]) -> None:
        """Adds samples, by their message.

        Raises:
            UserError: there are more than the limit.
        """
        for message in messages:
            if message in self.messages:  # at most `limit` of them
                continue
            self.messages.append(message)
            count = len(self.messages)
            if count > self.limit:
                others = f"; {count - 1} more cannot be read either" if count > 1 else ""
                raise UserError(
                    f"cannot read {message}{others}: repair or remove it, or tolerate more with {self._option} "
                    f"{count} or above"
                )
            _logger.warning(f"cannot read {message}: the file is skipped", extra=_EVERY_RANK)
