"""Look-up of data sets and models by name: functions of the user's own, and suggestions for misspelled names."""

import difflib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from hvd_adam.errors import UserError


def is_reference(name: str) -> bool:
    """Returns whether a name has the form `package.module:function`."""
    return ":" in name


def resolve(reference: str, kind: str) -> Callable[..., Any]:
    """Imports `package.module:function` and returns the function.

    Args:
        reference: the module is searched on `sys.path`, which has the current folder under `python -m`.
        kind: "data set" or "model", for messages.

    Raises:
        UserError: the module cannot be imported, has no such attribute, or the attribute cannot be called.
    """
    module_name, _, attribute = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise UserError(f"{kind} {reference!r} must have the form package.module:function")
    try:
        import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{kind} {reference!r}: cannot import {module_name} ({error}): is its folder the current one, or "
            "on PYTHONPATH, on every host?"
        ) from error
    except Exception as error:
        raise UserError(f"{kind} {reference!r}: importing {module_name} fails: {error!r}") from error
    try:
        found = pkgutil.resolve_name(reference)
    except AttributeError as error:
        raise UserError(f"{kind} {reference!r}: {error}: name a function of that module") from error
    if not callable(found):
        raise UserError(f"{kind} {reference!r} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def call(reference: str, kind: str, **arguments: object) -> Any:
    """Calls the function that `resolve` finds.

    Args:
        reference: as for `resolve`.
        kind: as for `resolve`.
        arguments: keyword arguments of the function.

    Raises:
        UserError: as `resolve`; or the function does not take these keywords.
    """
    function = resolve(reference, kind)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        names = ", ".join(arguments)
        raise UserError(f"{kind} {reference!r} must take the keywords {names}: {error}") from error
    except ValueError:  # a function written in C, whose signature is not available
        pass
    return function(**arguments)


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Returns the error for an unknown name, with similar names or, without any, all known ones.

    Args:
        kind: as for `resolve`.
        name: what the user gave.
        known: all valid names.
    """
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = f"use one of {', '.join(known)}, or package.module:function"
    return UserError(f"{kind} {name!r} is not known: {hint}")
