"""Configurations of known trainings, by name: `--config recipe:NAME`. Imports no torch."""

from __future__ import annotations

import difflib
from pathlib import Path

from hvd_adam.errors import UserError

PREFIX = "recipe:"

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of the recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """Returns the YAML file of a recipe.

    Args:
        name: without `PREFIX`.

    Raises:
        UserError: there is no such recipe; the message has similar names, or all.
    """
    if name in names():
        return _FOLDER / f"{name}.yaml"
    near = difflib.get_close_matches(name, names())
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names())}"
    raise UserError(f"--config {PREFIX}{name}: there is no such recipe: {hint}")
