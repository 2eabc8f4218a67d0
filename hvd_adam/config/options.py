"""How an option is declared and checked. Imports no torch.

The help text of a field is its documentation: `python -m hvd_adam.train --help` prints it. Underscores in field
names are dashes on the command line.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

from hvd_adam.errors import UserError
from hvd_adam.text import shown

LONGEST_VALUE = 300  # characters of a value in a message
MOST_DIGITS = 18  # of a number that is below 2⁶³


def option(default: Any, help: str, *, path: bool = False, positional: str = "") -> Any:
    """Declares a field of a configuration.

    Args:
        default: its value if the user gives none.
        help: its text in `--help`, which appends the default unless that is None, False or empty.
        path: whether `~` and environment variables in the value are expanded.
        positional: what stands for one value in `--help`, if the values are words without an option in front.
            Their type is `tuple[str, ...]`.
    """
    return field(default=default, metadata={"help": help, "path": path, "positional": positional})


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Checks an option.

    Args:
        holds: whether the value is valid.
        name: of the option, without the dashes in front.
        value: for the message.
        wanted: what the value must be, for the message.

    Raises:
        UserError: the value is not valid.
    """
    if not holds:
        raise UserError(f"--{name.replace('_', '-')} is {shown(str(value), LONGEST_VALUE)}: it must be {wanted}")


def positive_integer(text: str) -> int:
    """Returns a whole number above 0 that is part of an option; 0 for any other text, and above `MOST_DIGITS`.

    Args:
        text: ASCII digits. Python reads other digits, too, and raises ValueError for thousands of them.
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS else 0
