"""Names and messages of users as one line of text, and times. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_NAME = 24  # characters of a class's name in a table or a picture

_MOST_CLASSES = 5  # that a message names


def printable(text: str) -> str:
    """Returns a text with escape sequences for tabs, line breaks and other control characters."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shown(name: str, longest: int = LONGEST_NAME) -> str:
    """Returns a name for a line of text: printable, and shortened.

    Args:
        name: of any length.
        longest: characters of the result.
    """
    name = printable(name[: longest + 1])
    return name if len(name) <= longest else name[: longest - 1] + "…"


def described(classes: Sequence[str]) -> str:
    """Returns the number of classes and the first of their names, for a message."""
    names = [shown(name) for name in classes[:_MOST_CLASSES]] + ["…"] * (len(classes) > _MOST_CLASSES)
    return f"{len(classes)} classes ({', '.join(names)})"


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds: with three digits below 100 ms, else as a whole number."""
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:.3g}"
