"""Messages for arguments that are not accepted: options with a similar name, and the line of a configuration file.

Imports no torch, and yaml only where a file is given.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_adam import recipes
from hvd_adam.errors import UserError

if TYPE_CHECKING:
    import yaml

# Options of other programs, and this project's names for them; with dashes.
SYNONYMS = {
    "learning-rate": "lr",
    "base-lr": "lr",
    "wd": "weight-decay",
    "bs": "batch-size",
    "micro-batch-size": "batch-size",
    "per-device-train-batch-size": "batch-size",
    "train-batch-size": "global-batch-size",
    "total-batch-size": "global-batch-size",
    "n-epochs": "epochs",
    "num-train-epochs": "epochs",
    "steps": "max-steps",
    "iterations": "max-steps",
    "max-iters": "max-steps",
    "grad-accum": "accumulate",
    "accum-iter": "accumulate",
    "accumulation-steps": "accumulate",
    "gradient-accumulation-steps": "accumulate",
    "grad-accum-steps": "accumulate",
    "beta1": "betas",
    "beta2": "betas",
    "epsilon": "eps",
    "adam-epsilon": "eps",
    "clip": "max-grad-norm",
    "grad-clip": "max-grad-norm",
    "clip-grad": "max-grad-norm",
    "clip-grad-norm": "max-grad-norm",
    "gradient-clipping": "max-grad-norm",
    "scheduler": "lr-decay",
    "lr-scheduler": "lr-decay",
    "lr-schedule": "lr-decay",
    "lr-scheduler-type": "lr-decay",
    "warmup": "warmup-epochs",
    "warmup-steps": "warmup-epochs",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "dtype": "precision",
    "mixed-precision": "precision",
    "zero": "strategy",
    "zero-stage": "strategy",
    "adamw": "decoupled-weight-decay",
    "arch": "model",
    "network": "model",
    "data": "dataset",
    "data-path": "data-dir",
    "data-root": "data-dir",
    "root": "data-dir",
    "out": "output-dir",
    "save-dir": "output-dir",
    "log-dir": "output-dir",
    "logdir": "output-dir",
    "run-dir": "output-dir",
    "resume-from": "resume",
    "resume-from-checkpoint": "resume",
    "load": "checkpoint",
    "ckpt": "checkpoint",
    "save-every": "checkpoint-every",
    "save-steps": "checkpoint-every",
    "log-interval": "log-every",
    "logging-steps": "log-every",
    "eval-interval": "eval-every",
    "cuda": "device",
    "gpu": "device",
    "cpu": "device",
    "sync-bn": "sync-batchnorm",
    "time-limit": "max-time",
    "timeout": "stall-timeout",
    "random-seed": "seed",
    "random-state": "seed",
}

# Options whose empty value is their default or has a message of its own.
MAY_BE_EMPTY = ("--lr-decay-epochs", "--checkpoint")

_BOOLEANS = ("true", "false", "yes", "no", "on", "off")

# Options of launchers.
OF_LAUNCHERS = ("np", "n", "nproc", "nproc-per-node", "num-gpus", "gpus", "world-size", "nnodes", "ranks", "hosts")


def unknown_option(given: str, known: Iterable[str]) -> str:
    """Returns what is wrong with an unknown argument, with options that have a similar name.

    Args:
        given: the argument, with its dashes; or a key of a configuration file.
        known: all options, with dashes inside and none in front.
    """
    name = re.sub(r"^[-–—]+", "", given).replace("_", "-").lower().split("=")[0]
    names = list(known)
    near = [option for option in (SYNONYMS.get(name), name) if option in names]
    near = near or [option for option in names if option.replace("-", "") == name.replace("-", "")]
    near = near or difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    if not re.match(r"[-–—]", given):
        return f"{given} is not an option" + (f": did you mean {' or '.join(near)}?" if near else "")
    if near:
        return f"{given} is not an option: did you mean {' or '.join(f'--{option}' for option in near)}?"
    if name in OF_LAUNCHERS:
        return (
            f"{given} is not an option: the launcher sets the number of ranks, as in horovodrun -np 2 python -m …"
        )
    return f"{given} is not an option"


def unrecognized(
    words: Sequence[str], arguments: Sequence[str], known: Iterable[str], switches: Iterable[str]
) -> str:
    """Returns the message for words of the command line that belong to no option.

    Args:
        words: these words.
        arguments: the command line.
        known: as for `unknown_option`.
        switches: those of `known` that take no value.
    """
    names = list(known)
    if not re.match(r"[-–—]", words[0]):
        before = arguments[max(arguments.index(words[0]) - 1, 0)] if words[0] in arguments else ""
        if before[2:].removeprefix("no-") in switches:
            return takes_no_value(before)
        if before and (option := _option_of(words[0], arguments)):
            return f"{words[0]} belongs to no option: {option} takes one value"
        return f"{words[0]} belongs to no option: write --{names[0]} {words[0]}, for example"
    wrong = [word for word in words if re.match(r"[-–—]+[A-Za-z]", word)] or list(words[:1])
    return "; ".join(unknown_option(word, names) for word in wrong)


def _option_of(word: str, arguments: Sequence[str]) -> str | None:
    """Returns the option whose value precedes a word of the command line, or None."""
    option, value = arguments[max(arguments.index(word) - 2, 0)], arguments[max(arguments.index(word) - 1, 0)]
    return option if option.startswith("--") and "=" not in option and not value.startswith("-") else None


def takes_no_value(option: str) -> str:
    """Returns the message for a value of an on-off option."""
    name = option[2:].removeprefix("no-")
    return f"--{name} takes no value: write --{name} or --no-{name}"


def require_plain_options(arguments: Sequence[str]) -> None:
    """Checks that no option is nested, as in `--model.width 64`, and no value is empty.

    Raises:
        UserError: one is.
    """
    for argument, following in zip_longest(arguments, arguments[1:]):
        if not argument.startswith("--"):
            continue
        option, equals, value = argument.partition("=")
        name, dot, _ = option.partition(".")
        if dot:
            args = {"--model": "--model-args", "--dataset": "--data-args", "--data": "--data-args"}.get(name)
            remedy = f"; its arguments are given as in {args} '{{\"width\": 64}}'" if args else ""
            raise UserError(f"{option} is not an option: {name} has one value and no parts{remedy}")
        if (value if equals else following) == "" and option not in MAY_BE_EMPTY:
            raise UserError(f"{option} has an empty value: give one, or leave the option out")


def expand_path(text: str, option: str) -> str:
    """Returns a path with `~` and environment variables replaced, as a shell does.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    path = os.path.expanduser(os.path.expandvars(text))
    missing = re.search(r"\$(\w+|\{\w+\})", path)
    if missing:
        raise UserError(f"{option} is {text}: the variable {missing[1].strip('{}')} is not set")
    if path.startswith("~"):
        raise UserError(f"{option} is {text}: no user has this name; write ./{text} for a folder of that name")
    return path


def _is_config(option: str) -> bool:
    return len(option) > 4 and "--config".startswith(option)  # argparse accepts abbreviations


def _source(text: str, node: yaml.Node) -> str:
    """Returns a key or value of a YAML file: that of a scalar, and of another node as it is written."""
    if isinstance(node.value, str):
        return node.value
    return " ".join(text[node.start_mark.index : node.end_mark.index].split())


class ConfigFiles:
    """The configuration files of a command line.

    Args:
        arguments: the command line.
        known: the options, with dashes inside and none in front.
        switches: those of them that are on or off.
        mappings: those of them whose value is a mapping.

    Raises:
        UserError: a file is not valid YAML, or has an unknown, nested, repeated or empty key; names file and line.

    Attributes:
        arguments: the command line, with the paths of files expanded.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        known: Iterable[str],
        switches: Iterable[str],
        mappings: Iterable[str] = (),
    ) -> None:
        self.arguments: list[str] = []
        self._switches, self._mappings = set(switches), set(mappings)
        self._places: dict[str, str] = {}
        self._given: set[str] = set()
        names, is_path = list(known), False
        for argument in arguments:
            option, equals, value = argument.partition("=")
            if is_path:
                self.arguments.append(self._file(argument, names))
            elif equals and _is_config(option):
                self.arguments.append(f"--config={self._file(value, names)}")
            else:
                self.arguments.append(argument)
            is_path = not is_path and _is_config(argument)
            self._given.add(option[2:].removeprefix("no-"))

    def _file(self, path: str, known: list[str]) -> str:
        if path.startswith(recipes.PREFIX):
            path = str(recipes.path(path.removeprefix(recipes.PREFIX)))
        path = expand_path(path, "--config")
        if path and not Path(path).is_file():
            raise UserError(f"--config {path}: " + ("not a file" if Path(path).exists() else "no such file"))
        if path:
            self._read(path, known)
        return path

    def _read(self, path: str, known: list[str]) -> None:
        import yaml  # as jsonargparse, only where it is needed

        try:
            text = Path(path).read_text(encoding="utf-8")
            root = yaml.compose(text)
        except OSError as error:
            raise UserError(f"--config {path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path} is not a text file in UTF-8: {error.reason}") from None
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            problem = " ".join(str(getattr(error, "problem", error)).split())
            raise UserError(f"{path}{place}: this is not valid YAML ({problem})") from None
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"--config {path} has no options: write one a line, as in epochs: 3")
        seen: dict[str, str] = {}
        for key, value in root.value:
            place, name = f"{path}, line {key.start_mark.line + 1}", _source(text, key)
            option = name.replace("_", "-")
            if option not in known:
                raise UserError(f"{place}: {unknown_option(name, known)}")
            if option in seen:
                raise UserError(f"{place}: {name} is given twice, before in {seen[option]}")
            if isinstance(value, yaml.MappingNode) and option not in self._mappings:
                remedy = f"give it one, as in {name}: VALUE"
                if f"{option}-args" in self._mappings:
                    remedy += f"; its arguments are the option {name}_args"
                raise UserError(f"{place}: {name} has nested values: {remedy}")
            empty = isinstance(value, yaml.ScalarNode) and value.value == ""
            if empty and (value.style is None or f"--{option}" not in MAY_BE_EMPTY):
                raise UserError(f"{place}: {name} has an empty value: give one, or remove the line")
            if not value.tag.startswith("tag:yaml.org,2002:") or "/" in value.tag:
                raise UserError(f"{place}: {name} has the tag {value.tag}: give it a plain value")
            if option in self._switches and str(value.value).lower() not in _BOOLEANS:
                raise UserError(f"{place}: {name} is {_source(text, value)}: it must be true or false")
            seen[option] = place
        self._places |= seen

    def locate(self, message: str) -> str:
        """Returns a message about an option, preceded by file and line if its value is from a file."""
        option = re.match(r"--(?:no-)?([\w-]+)", message)
        if option is None or option[1] in self._given or option[1] not in self._places:
            return message
        return f"{self._places[option[1]]}: {message}"
