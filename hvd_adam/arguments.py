"""Command-line arguments and YAML files into a dataclass configuration. Imports no torch.

jsonargparse does the parsing. Commands that run on the standard library alone, as the doctor does, fall back on
argparse where jsonargparse is not installed; their `--config` then asks for the extra.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from hvd_adam._version import __version__
from hvd_adam.argument_checks import (
    ConfigFiles,
    expand_path,
    require_plain_options,
    takes_no_value,
    unrecognized,
)
from hvd_adam.argument_order import files_first, positionals_last, with_dashes
from hvd_adam.errors import UserError
from hvd_adam.extras import install_command

if TYPE_CHECKING:
    import jsonargparse

Config = TypeVar("Config")

MAPPING = Mapping[str, Any] | None


def parse(
    config: type[Config], name: str, argv: Sequence[str] | None = None, *, needs_extra: bool = False
) -> Config:
    """Parses the command line and `--config` files into a configuration.

    Args:
        config: a dataclass; the metadata of each field has its "help" (`hvd_adam.config.option`).
        name: of the module, as in `python -m name`.
        argv: the arguments; those of this process by default.
        needs_extra: whether to raise ModuleNotFoundError where jsonargparse is missing, instead of falling back on
            argparse.

    Raises:
        UserError: an unknown option, or a value of the wrong type or out of range. The message is one line.
    """
    arguments = files_first(with_dashes(sys.argv[1:] if argv is None else argv))
    try:
        import jsonargparse  # here: the doctor runs without it
    except ModuleNotFoundError:
        if needs_extra:
            raise
        return _parse_plain(config, name, arguments)
    types = _types(config)
    require_plain_options(arguments)
    given = [argument.replace("--print_config", "--print-config", 1) for argument in arguments]
    if _positionals(config):
        given = positionals_last(given, _names(types, bool))
    files = ConfigFiles(given, _names(types), _names(types, bool), _names(types, MAPPING))
    try:
        values = _parser(config, name).parse_args(files.arguments).as_dict()
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        message = _one_line(str(error), config, files.arguments)
        raise UserError(f"{files.locate(message)} ({_see_help(name)})") from None
    try:
        items = fields(config)  # type: ignore[arg-type]  # a dataclass
        return config(**{item.name: _checked(item, values[item.name], types) for item in items})
    except UserError as error:
        raise UserError(files.locate(str(error))) from None


def _checked(item: Field[Any], value: Any, types: dict[str, Any]) -> Any:
    """Returns the value of an option; `~` and variables in a path are expanded."""
    if value is None and type(None) not in get_args(types[item.name]):
        raise UserError(f"{_option(item.name)} is null: it must be {_expected(types[item.name])}")
    if isinstance(value, int) and abs(value) >= 2**63:
        shown = f"{value:.3g}" if abs(value) < 10**300 else "too large"  # for a float, and for a line
        raise UserError(f"{_option(item.name)} is {shown}: it must be below 2⁶³")
    if isinstance(value, str) and item.metadata.get("path"):
        return expand_path(value, _option(item.name))
    if isinstance(value, list) and (name := item.metadata.get("positional")):
        return tuple(expand_path(str(part), name) if item.metadata["path"] else str(part) for part in value)
    return value


def _parser(config: type, name: str) -> jsonargparse.ArgumentParser:
    import jsonargparse

    class Parser(_PrintingParser, jsonargparse.ArgumentParser):
        pass

    parser = Parser(
        prog=f"python -m {name}",
        description=_summary(config),
        exit_on_error=False,
        allow_abbrev=True,
        print_config="--print-config",
        usage=" ".join([f"python -m {name} [options]", *_positionals(config)]),
        epilog=getattr(config, "EXAMPLES", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,  # jsonargparse's own appends Python types
    )
    read_file = jsonargparse.ActionConfigFile  # type: ignore[attr-defined]  # documented, but not in its __all__
    parser.add_argument("--config", action=read_file, help="YAML file with any of the options, or recipe:NAME")
    parser.add_argument("--version", action="version", version=f"hvd_adam {__version__}")
    printing = next(action for action in parser._actions if action.dest == "print_config")
    printing.help, printing.metavar = "print the configuration that results from all other arguments, and exit", ""
    types, items = _types(config), {item.name: item for item in fields(config)}
    for title, members in _groups(config).items():
        group = parser.add_argument_group(title)
        for member in members:
            _add(group, items[member], types[member])
    return parser


class _PrintingParser(argparse.ArgumentParser):
    """Prints `--help` and `--version`, or raises OSError, which argparse ignores in current releases of Python."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


def _types(config: Any) -> dict[str, Any]:
    """Returns the types of the options by the names of their fields."""
    hints = get_type_hints(config)
    return {item.name: hints[item.name] for item in fields(config)}


def _groups(config: Any) -> dict[str, list[str]]:
    """Returns the names of the options by the titles under which `--help` lists them."""
    given = {title: members.split() for title, members in getattr(config, "GROUPS", {}).items()}
    listed = {member for members in given.values() for member in members}
    others = [item.name for item in fields(config) if item.name not in listed]
    return {**given, "further options" if given else "options of this command": others} if others else given


def _add(group: Any, item: Field[Any], kind: Any) -> None:
    """Adds an option to a parser or a group of it."""
    import jsonargparse

    option, text = _option(item.name), _help(item)
    if metavar := item.metadata.get("positional"):
        group.add_argument(item.name, type=str, nargs="*", default=item.default, help=text, metavar=metavar)
    elif kind is bool:
        negation = jsonargparse.ActionYesNo(no_prefix="no-")
        group.add_argument(option, action=negation, default=item.default, help=text)
    elif kind == tuple[float, float]:
        group.add_argument(option, type=two_numbers, default=item.default, help=text, metavar="X,X")
    else:
        group.add_argument(option, type=kind, default=item.default, help=text, metavar=_metavar(kind))


def two_numbers(text: Any) -> tuple[float, float]:
    """Parses two numbers, "0.9,0.999" or "[0.9, 0.999]", or takes the list of a configuration file."""
    parts = text.strip("[]() ").replace(",", " ").split() if isinstance(text, str) else text
    first, second = (float(part) for part in parts)
    return first, second


def _positionals(config: Any) -> list[str]:
    """Returns what stands for the values without an option in the usage line; empty if there are none."""
    names = [item.metadata.get("positional") for item in fields(config)]
    return [f"{name} [{name} ...]" for name in names if name]


def _option(field_name: str) -> str:
    return f"--{field_name.replace('_', '-')}"


def _names(types: dict[str, Any], kind: Any = None) -> list[str]:
    """Returns the names of all options, or of those of one type, with dashes inside and none in front."""
    return [name.replace("_", "-") for name in types if kind in (None, types[name])]


def _summary(config: type) -> str:
    return (config.__doc__ or "").splitlines()[0]


def _help(item: Field[Any]) -> str:
    """Returns the help text of a field with its default, unless that is None, off or empty."""
    text, default = str(item.metadata["help"]).replace("%", "%%"), item.default
    if default is None or default is False or default in ("", ()):
        return text
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{text} (default: {'on' if default is True else default})"


def _metavar(kind: Any) -> str | None:
    """Returns what stands for the value in the help: N, X (a float) or the choices; None for the option's name."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    return "MAPPING" if kind == MAPPING else {int: "N", float: "X"}.get(_scalar(kind))


def _see_help(name: str) -> str:
    return f"see python -m {name} --help"


def _one_line(message: str, config: type, arguments: Sequence[str]) -> str:
    """Turns jsonargparse's report of a bad argument, which has several lines, into one line."""
    message, types = " ".join(message.split()), _types(config)
    if words := re.findall(r"\S+", (message.partition("unrecognized arguments: "))[2]):
        return unrecognized(words, arguments, _names(types), _names(types, bool))
    if switch := re.match(r"argument (--[\w-]+)/.*ignored explicit argument", message):
        return takes_no_value(switch[1])
    if missing := _without_value(message, types):
        return missing
    pair = re.fullmatch(r"argument (--[\w-]+): invalid two_numbers value: '(.*)'", message)
    if pair:
        return f"{pair[1]} is {pair[2]}: it must be {_expected(tuple[float, float])}"
    key = re.search(r'Parser key "(\w+)":', message)
    if key and types.get(key[1]) == tuple[float, float]:
        return f"{_option(key[1])} must be {_expected(types[key[1]])}"
    wrong = re.search(r'Parser key "(\w+)":.* (?:Got|Given) value: (.*)', message)
    if not wrong or wrong[1] not in types:
        return re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    return f"{_option(wrong[1])} is {wrong[2]}: it must be {_expected(types[wrong[1]])}"


def _without_value(message: str, types: Mapping[str, Any]) -> str | None:
    """Returns what argparse's report of an option without a value means, or None for other reports."""
    option = re.fullmatch(r"argument (--[\w-]+): expected one argument", message)
    if option is None:
        return None
    kind = types.get(option[1].removeprefix("--").replace("-", "_"))
    expected = "a YAML file or recipe:NAME" if kind is None else _expected(kind)  # --config is no field
    sign = f" (write a negative one as {option[1]}=-1e-3)" if expected == "a number" else ""
    return f"{option[1]} needs a value: it must be {expected}{sign}"


def _expected(kind: Any) -> str:
    """Describes the values of a type."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind == tuple[float, float]:
        return "two numbers, as in 0.9,0.999"
    if kind == MAPPING:
        return """a mapping, as in '{"width": 64}'"""
    scalar = _scalar(kind)
    if scalar in (int, float):
        return "a whole number" if scalar is int else "a number"
    return "text (in quotes where YAML reads it as something else)"


# Without jsonargparse.


class _PlainParser(_PrintingParser):
    types: Mapping[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        message = _without_value(message, self.types) or message
        raise UserError(f"{message} ({_see_help(self.prog.removeprefix('python -m '))})")


class _ConfigAction(argparse.Action):
    def __call__(self, *_: object) -> NoReturn:
        raise UserError(f"--config needs jsonargparse, which is not installed: {install_command('jsonargparse')}")


def _parse_plain(config: type[Config], name: str, arguments: list[str]) -> Config:
    """Parses with argparse: bool, int, float, str, Literal, and each of them or None."""
    parser = _PlainParser(
        prog=f"python -m {name}",
        description=_summary(config),
        argument_default=argparse.SUPPRESS,  # those of `config`
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=_ConfigAction, help="YAML file with any of the options")
    types = parser.types = _types(config)
    for item in fields(config):  # type: ignore[arg-type]  # a dataclass
        kind, text = types[item.name], _help(item)
        if kind is bool:
            toggle = argparse.BooleanOptionalAction
            parser.add_argument(_option(item.name), action=toggle, help=text)
        else:
            parser.add_argument(_option(item.name), help=text, metavar=_metavar(kind))
    require_plain_options(arguments)
    parsed, others = parser.parse_known_args(arguments)
    if others:
        parser.error(unrecognized(others, arguments, _names(types), _names(types, bool)))
    given = {key: _convert(key, value, types[key]) for key, value in vars(parsed).items()}
    items = {item.name: item for item in fields(config)}  # type: ignore[arg-type]  # a dataclass
    return config(**{key: _checked(items[key], value, types) for key, value in given.items()})


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Converts a text from the command line to an option's type; an on-off option has its value already."""
    if isinstance(value, bool):
        return value
    try:
        if get_origin(kind) is not Literal:
            return _scalar(kind)(value)
        if value in get_args(kind):
            return value
    except ValueError:
        pass
    raise UserError(f"{_option(name)} is {value}: it must be {_expected(kind)}")


def _scalar(kind: Any) -> type:
    """Returns int, float or str: the type itself, or the one that may also be None."""
    return next((member for member in get_args(kind) or (kind,) if member in (int, float)), str)
