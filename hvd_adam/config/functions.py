"""Options that name functions of the user's own, and the arguments of these. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_adam.config.options import require
from hvd_adam.errors import UserError
from hvd_adam.import_path import is_reference

# What metrics.jsonl has under `test_<name>` already.
_TAKEN = ("loss", "accuracy", "balanced_accuracy", "ece")


def require_reference(value: str | None, name: str) -> None:
    """Checks that an option is None or names a function.

    Args:
        value: the option's.
        name: the option's, for the message.

    Raises:
        UserError: it is not of the form `package.module:function`.
    """
    require(value is None or is_reference(value), name, value, "package.module:function")


def require_plain(args: Mapping[str, Any] | None, name: str) -> None:
    """Checks that the arguments of a function are plain values, which files and checkpoints can hold.

    Args:
        args: keyword arguments, or None.
        name: of the option, for the message.

    Raises:
        UserError: a key is not a name, or a value is not plain.
    """
    for key, value in (args or {}).items():
        require(isinstance(key, str) and key.isidentifier(), name, args, "a mapping from names of parameters")
        if not _is_plain(value):
            wanted = "numbers, texts, true, false, null, lists and mappings of these"
            raise UserError(f"--{name} has {key}: {value!r}, but its values must be {wanted}")


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def metric_names(metrics: str | None) -> dict[str, str]:
    """Returns the functions of `--metrics` by the names under which they are recorded, without "test_".

    Args:
        metrics: the option: functions separated by commas, or None.

    Raises:
        UserError: one is no function, or has a name that another one has.
    """
    found: dict[str, str] = {}
    for reference in [part.strip() for part in (metrics or "").split(",") if part.strip()]:
        require_reference(reference, "metrics")
        name = reference.partition(":")[2].replace(".", "_")
        if name in found or name in _TAKEN:
            raise UserError(f"--metrics {reference}: test_{name} is recorded already: give it another name")
        found[name] = reference
    return found
