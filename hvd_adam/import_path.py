"""Look-up by name, shared by data sets and models: the user's own functions, and near names for a slip."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from hvd_adam.errors import UserError


def is_reference(name: str) -> bool:
    """Return whether ``name`` has the form ``package.module:function``."""
    return ":" in name


def resolve(reference: str, kind: str) -> Callable[..., Any]:
    """Import ``package.module:function`` and return the function.

    ``kind`` ("data set", "model") is for messages. The current folder is searched where Python does so
    (``python -m``). Raises UserError where the module cannot be imported, has no such attribute, or the
    attribute cannot be called.
    """
    module_name, _, attribute = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise UserError(f"{kind} {reference!r} must have the form package.module:function")
    try:
        found: Any = import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{kind} {reference!r}: cannot import {module_name} ({error}): is its folder the current one, or "
            "on PYTHONPATH, on every host?"
        ) from error
    except Exception as error:
        raise UserError(f"{kind} {reference!r}: importing {module_name} fails: {error!r}") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise UserError(f"{kind} {reference!r}: {error}: name a function of that module") from error
    if not callable(found):
        raise UserError(f"{kind} {reference!r} is a {type(found).__name__}, not a function")
    return found


def call(reference: str, kind: str, **arguments: object) -> Any:
    """Call the function that ``resolve`` finds with these keywords; UserError where it does not take them."""
    function = resolve(reference, kind)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        names = ", ".join(arguments)
        raise UserError(f"{kind} {reference!r} must take the keywords {names}: {error}") from error
    except ValueError:  # written in C, without a signature to look at
        pass
    return function(**arguments)


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a ``name`` that is not among the ``known``: with near names, or else with all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"use one of {', '.join(known)}, or package.module:function"
    return UserError(f"{kind} {name!r} is not known: {hint}")
