"""Entry point of every command: parses the arguments, runs the command, and turns errors into exit codes.

Exit codes: 0 done; 2 bad arguments, bad input or a missing package (one line on stderr, no traceback); others as
in `hvd_adam.recovery.failure`. Imports no torch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from hvd_adam import log
from hvd_adam.arguments import Config, parse
from hvd_adam.distributed.context import current_rank
from hvd_adam.distributed.launch_env import BUILD_COMMAND, detect_launcher
from hvd_adam.errors import CollectiveError, JobError, RankError, UserError
from hvd_adam.extras import install_command
from hvd_adam.recovery.failure import GRACE_SECONDS, Failure, leave, leave_later, stopped_by_launcher
from hvd_adam.recovery.preemption import ignore_signals

__all__ = ["parse", "run", "subcommand"]

SHUTDOWN_SECONDS = 10.0  # for Horovod's shutdown at the end of a successful command


def run(
    main: Callable[[Config], None],
    config: type[Config],
    name: str,
    argv: Sequence[str] | None = None,
    *,
    needs_extra: bool = False,
) -> NoReturn:
    """Parses the arguments into `config`, calls `main` with it, and exits with the matching exit code.

    Args:
        main: the command; runs on every rank.
        config: a dataclass whose fields have help texts (`hvd_adam.config.option`).
        name: of the module, as in `python -m name`.
        argv: the arguments; those of this process by default.
        needs_extra: as in `hvd_adam.arguments.parse`.
    """
    log.setup()
    starting, code = True, 0
    try:
        try:
            values = parse(config, name, argv, needs_extra=needs_extra)
        except OSError as error:  # of --help and --version
            log.discard(sys.stdout)
            raise UserError(log.lost(error)) from None
        starting = False
        main(values)
    except SystemExit as done:  # of --help, --version and --print-config, or of a command with a result of its own
        code = _exit_code(done)
    except (Exception, KeyboardInterrupt) as error:
        _end(error, name, starting)
    ignore_signals()
    # Horovod's shutdown waits for the other ranks: half a minute and more if one was killed meanwhile.
    if unwritten := log.finish():
        print(f"{name}: error: {log.lost(unwritten)}", file=sys.stderr)
        code = code or 2
    leave_later(code, SHUTDOWN_SECONDS)
    sys.exit(code)


def _exit_code(done: SystemExit) -> int:
    """Returns the exit code of a `sys.exit`; prints what it was given in place of one, as Python does."""
    if done.code is None or isinstance(done.code, int):
        return int(done.code or 0)
    print(done.code, file=sys.stderr)
    return 1


def subcommand(
    argv: Sequence[str], configs: Mapping[str, type], name: str, about: str, *, kind: str = "command"
) -> str:
    """Returns the subcommand, the first argument; with --help, or another one, exits after what it prints.

    Args:
        argv: the arguments.
        configs: the configuration of each subcommand, whose docstring begins with what it does.
        name: of the module, as in `python -m name`.
        about: docstring of the module.
        kind: what a subcommand is, for messages.
    """
    chosen = argv[0] if argv else ""
    if chosen in ("-h", "--help"):
        print(f"usage: python -m {name} {{{','.join(configs)}}} [options]\n\n{about.strip()}\n")
        for each, config in configs.items():
            print(f"  {each:<10} {(config.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if chosen not in configs:
        problem = f"{chosen!r} is not a {kind}" if chosen else f"no {kind} given"
        print(f"{name}: error: {problem}: use one of {', '.join(configs)}", file=sys.stderr)
        sys.exit(2)
    return chosen


def _own_rank() -> int:
    """Returns this process's rank; 0 if the launcher's variables are wrong, which every rank then reports."""
    try:
        return current_rank()
    except UserError:
        return 0


def _end(error: BaseException, name: str, starting: bool) -> NoReturn:
    """Prints the error once for the job and exits with its code.

    If ranks fail together, one prints its error and exits, and the launcher ends the others meanwhile. An expected
    error is printed by rank 0, and by another rank only if rank 0 does not fail too.
    """
    if isinstance(error, ModuleNotFoundError) and (command := _install_command(error.name or "")):
        error = UserError(f"{error.name} is not installed: {command}")
    failure, rank = Failure.of(error), _own_rank()
    where = f"rank {rank} on {socket.gethostname()}"
    if failure.traceback:
        grace = GRACE_SECONDS * (1 + rank / max(detect_launcher().size, rank + 1))
        text = f"{name}: {where} {failure.lost_ranks or failure.line}\n"
        if not stopped_by_launcher(grace if rank or failure.lost_ranks else 0):
            sys.stderr.write(text if failure.lost_ranks else failure.traceback + text)
    elif failure.line and (rank == 0 or isinstance(error, RankError)):
        print(f"{name}: {failure.line}", file=sys.stderr, flush=True)
    elif (
        failure.line
        and not isinstance(error, CollectiveError | JobError)
        and not stopped_by_launcher(GRACE_SECONDS, starting)
    ):
        print(f"{name}: {failure.line} [{where}]", file=sys.stderr, flush=True)
    leave(failure)


def _install_command(module: str) -> str | None:
    return BUILD_COMMAND if module.partition(".")[0] == "horovod" else install_command(module)
