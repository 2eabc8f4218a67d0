"""A command's frame: arguments in, one line and an exit code out, on every rank. Imports no torch.

Exit codes: 0 done, 2 bad arguments or input (one line on stderr, no traceback), 75 stopped early after a
checkpoint (EX_TEMPFAIL of sysexits.h: try again), 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse

from hvd_adam import log
from hvd_adam.distributed.context import current_rank
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.errors import CollectiveError, JobError, Preempted, RankError, UserError
from hvd_adam.recovery.preemption import ignore_signals, stop_requested

Config = TypeVar("Config")

# The launcher ends the other ranks once rank 0 has exited; only if it has not by then do they speak too.
GRACE_SECONDS = 8.0  # on a busy machine it takes horovodrun --gloo more than 3
END_SECONDS = 10.0  # for Horovod to end once all is done


def run(
    main: Callable[[Config], None], config: type[Config], name: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Parses the arguments into `config`, calls `main` with it, and exits with the code of what came of it.

    Args:
        main: the command; runs on every rank.
        config: a dataclass whose fields have help texts (`hvd_adam.config`).
        name: as in `python -m name`.
        argv: the arguments; those of this process by default.
    """
    log.setup()
    try:
        main(parse(config, name, argv))
    except UserError as error:
        _exit_with(error, f"{name}: error: {error}", 2)
    except JobError as error:
        _exit_with(error, f"{name}: error: {error}", 1)
    except Preempted:
        _leave(75)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        _fail(error, name)
    ignore_signals()
    # Horovod's end waits for the other ranks: of one that was killed meanwhile, half a minute and more.
    sys.stdout.flush()
    late = threading.Timer(END_SECONDS, os._exit, [0])
    late.daemon = True
    late.start()
    sys.exit(0)


def parse(config: type[Config], name: str, argv: Sequence[str] | None = None) -> Config:
    """Reads the command line and `--config` files into a configuration.

    Raises:
        UserError: an unknown option, a value of the wrong type or out of its range; one line.
    """
    parser = _parser(config, name)
    try:
        values = parser.parse_args(_understood(sys.argv[1:] if argv is None else argv)).as_dict()
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"{_one_line(str(error), config)} (see python -m {name} --help)") from None
    return config(**{item.name: values[item.name] for item in fields(config)})


def _parser(config: type, name: str) -> jsonargparse.ArgumentParser:
    summary = (config.__doc__ or "").splitlines()[0]
    parser = jsonargparse.ArgumentParser(prog=f"python -m {name}", description=summary, exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file with any of the options")
    types = get_type_hints(config)
    for item in fields(config):
        option, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
        if types[item.name] is bool:
            negation = jsonargparse.ActionYesNo(no_prefix="no-")
            parser.add_argument(option, action=negation, default=item.default, help=text)
        elif types[item.name] == tuple[float, float]:
            parser.add_argument(option, type=two_numbers, default=item.default, help=text)
        else:
            parser.add_argument(option, type=types[item.name], default=item.default, help=text)
    return parser


def two_numbers(text: Any) -> tuple[float, float]:
    """Two numbers: 0.9,0.999 or [0.9, 0.999], as a text or as a configuration file's list."""
    parts = text.strip("[]() ").replace(",", " ").split() if isinstance(text, str) else text
    first, second = (float(part) for part in parts)
    return first, second


def _understood(argv: Sequence[str]) -> list[str]:
    """Accepts underscores for dashes in the names of options, as configuration files have them."""
    arguments = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        is_option = option.startswith("--") and option != "--print_config"
        arguments.append((option.replace("_", "-") if is_option else option) + equals + value)
    return arguments


def _one_line(message: str, config: type) -> str:
    """Turns jsonargparse's report of a value that does not fit, over several lines, into one line."""
    message = " ".join(message.split())
    pair = re.fullmatch(r"argument (--[\w-]+): invalid two_numbers value: '(.*)'", message)
    if pair:
        return f"{pair[1]} is {pair[2]}: it must be two numbers, as in 0.9,0.999"
    wrong = re.search(r'Parser key "(\w+)":.* (?:Got|Given) value: (.*)', message)
    if not wrong or wrong[1] not in get_type_hints(config):
        return re.sub(r'Parser key "(\w+)":', r"--\1:", message)
    return f"--{wrong[1].replace('_', '-')} is {wrong[2]}: it must be {_wanted(get_type_hints(config)[wrong[1]])}"


def _wanted(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    for member in get_args(kind) or (kind,):
        if member in (int, float):
            return "a whole number" if member is int else "a number"
    return "a text (in quotes where it looks like a number)"


def _exit_with(error: UserError | JobError, line: str, code: int) -> NoReturn:
    rank = current_rank()
    if rank == 0 or isinstance(error, RankError):
        print(line, file=sys.stderr, flush=True)
    elif not isinstance(error, CollectiveError | JobError) and not _ended_meanwhile(GRACE_SECONDS):
        print(f"{line} [rank {rank} on {socket.gethostname()}]", file=sys.stderr, flush=True)
    _leave(code)


def _fail(error: Exception, name: str) -> NoReturn:
    """Shows the first cause once: of ranks that fail together one speaks, and the launcher ends the others."""
    rank = current_rank()
    where = f"{name}: rank {rank} on {socket.gethostname()}"
    grace = GRACE_SECONDS * (1 + rank / max(detect_launcher().size, rank + 1))
    if type(error).__name__ == "HorovodInternalError":  # for another has ended, most likely
        text = f"{where} lost the others: {error}\n"
    else:
        text = f"{''.join(traceback.format_exception(error))}{where} failed: {error!r}\n"
        grace *= rank > 0
    if not _ended_meanwhile(grace):
        sys.stderr.write(text)
    _leave(1)


def _ended_meanwhile(seconds: float) -> bool:
    """Waits; whether the launcher has told this rank to end, that is, another rank has spoken."""
    before, end = stop_requested(), time.monotonic() + seconds
    while time.monotonic() < end:
        if stop_requested() and not before:
            return True
        time.sleep(0.05)
    return False


def _leave(code: int) -> NoReturn:
    """Ends this process at once: Horovod's own end would wait for ranks that are stuck in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
