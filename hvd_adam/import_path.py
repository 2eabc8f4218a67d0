"""Look-up of data sets and models by name: functions of the user's own, and suggestions for misspelled names."""

import difflib
import inspect
import pkgutil
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from hvd_adam.errors import UserError


def is_reference(name: str) -> bool:
    """Returns whether a name has the form `package.module:function`."""
    return ":" in name


def resolve(reference: str, kind: str) -> Callable[..., Any]:
    """Imports `package.module:function` and returns the function.

    Args:
        reference: the module is searched on `sys.path`, which has the current folder under `python -m`.
        kind: "data set", "model" or an option, for messages.

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


def accepts(reference: str, kind: str, name: str) -> bool:
    """Returns whether the function that `resolve` finds has a parameter of this name; raises as `resolve`."""
    names, takes_any = _parameters(resolve(reference, kind))
    return takes_any or name in names


def call(
    reference: str,
    kind: str,
    offered: Mapping[str, object],
    args: Mapping[str, object] | None = None,
    option: str = "",
    *,
    only_named: Collection[str] = (),
) -> Any:
    """Calls the function that `resolve` finds, with those of the offered keywords that it has.

    Args:
        reference: as for `resolve`.
        kind: as for `resolve`.
        offered: values by the names of parameters.
        args: further keyword arguments, which the function must have; they override what is offered.
        option: from which `args` come, for messages.
        only_named: offered values that a function gets only if it names them, and not by its `**keywords`.

    Raises:
        UserError: as `resolve`; the function lacks a parameter that `args` has, or needs one that is not given.
    """
    function, what, args = resolve(reference, kind), f"{kind} {reference!r}", args or {}
    names, takes_any = _parameters(function)
    for name in args:
        if name not in names and not takes_any:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names) or 'none'}"
            raise UserError(f"{option} has {name}, but {what} has no parameter {name}: {hint}")
    wanted = (name for name in offered if name in names or (takes_any and name not in only_named))
    given = {name: offered[name] for name in wanted} | dict(args)
    for name, parameter in names.items():
        if parameter.default is parameter.empty and (name not in given or parameter.kind is _BY_POSITION):
            remedy = f"""give it, as in {option} '{{"{name}": …}}'"""
            if parameter.kind is _BY_POSITION:
                remedy = "only keywords are passed"
            raise UserError(f"{what} needs the parameter {name}, which is not given: {remedy}")
    return function(**given)


_BY_POSITION = inspect.Parameter.POSITIONAL_ONLY


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """Returns a function's parameters by name, and whether it takes any other keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return {}, True
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {parameter.name: parameter for parameter in parameters if parameter.kind not in several}
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def failure(error: Exception) -> str:
    """Describes in one line what a function of the user's own has raised, with file and line of it.

    Args:
        error: as caught.
    """
    text = next(iter(str(error).splitlines()), "")
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "site-packages" not in frame.filename and not frame.filename.startswith(_NOT_OF_THE_USER):
            place = f" ({Path(frame.filename).name}, line {frame.lineno})"
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


# This package, the standard library, and code without a file.
_NOT_OF_THE_USER = (str(Path(__file__).parent), str(Path(inspect.__file__).parent), "<")


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
