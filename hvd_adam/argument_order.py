"""The order of a command line: brings what users write anywhere into the order that argparse needs."""

from __future__ import annotations

from collections.abc import Sequence

_WITHOUT_VALUE = ("-h", "--help", "--version", "--print-config")


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Replaces underscores in option names by dashes, so that the names of configuration files work too."""
    arguments = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        if option in ("--model.args", "--data.args"):  # other programs write the arguments of a part so
            option = option.replace(".", "-")
        is_option = option.startswith("--") and option != "--print_config"
        arguments.append((option.replace("_", "-") if is_option else option) + equals + value)
    return arguments


def files_first(arguments: list[str]) -> list[str]:
    """Moves `--config FILE` to the front, in order: other options override files, wherever they stand.

    The launch scripts put options of their own in front of the user's.
    """
    files: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        is_file = argument.partition("=")[0] in ("--con", "--conf", "--confi", "--config")  # abbreviations
        (files if is_file else others).append(argument)
        if is_file and "=" not in argument:
            files += [value for value in [next(rest, None)] if value is not None]
    return files + others


def positionals_last(arguments: list[str], switches: Sequence[str]) -> list[str]:
    """Moves the words that are no options and no values of options behind them: argparse wants them together."""
    without_value = [*(f"--{no}{name}" for name in switches for no in ("", "no-")), *_WITHOUT_VALUE]
    options: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*options, "--", *words, *rest]
        is_option = argument.startswith("-") and argument != "-"
        (options if is_option else words).append(argument)
        if is_option and "=" not in argument and not any(name.startswith(argument) for name in without_value):
            options += [value for value in [next(rest, None)] if value is not None]
    return options + words
