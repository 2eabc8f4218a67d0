"""Entry point of every command: parses the arguments, runs the command, and turns errors into exit codes.

Exit codes: 0 done; 2 bad arguments, bad input or a missing package (one line on stderr, no traceback); 75 stopped
early after a checkpoint (EX_TEMPFAIL of sysexits.h: try again); 1 any other error. Imports no torch.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from hvd_adam import log
from hvd_adam.arguments import Config, parse
from hvd_adam.distributed.context import current_rank
from hvd_adam.distributed.launch_env import BUILD_COMMAND, detect_launcher
from hvd_adam.errors import CollectiveError, JobError, Preempted, RankError, UserError
from hvd_adam.extras import install_command
from hvd_adam.recovery.preemption import ignore_signals, stop_requested

__all__ = ["parse", "run"]

# The launcher ends the other ranks once rank 0 has exited. They print the error too if it has not by then.
GRACE_SECONDS = 8.0  # on a busy machine horovodrun --gloo takes more than 3
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
    starting = True
    try:
        values = parse(config, name, argv, needs_extra=needs_extra)
        starting = False
        main(values)
    except UserError as error:
        _exit_with(error, f"{name}: error: {error}", 2, starting=starting)
    except JobError as error:
        _exit_with(error, f"{name}: error: {error}", 1)
    except Preempted:
        _leave(75)
    except KeyboardInterrupt:
        _leave(130)
    except ModuleNotFoundError as error:
        command = _install_command(error.name or "")
        if command is None:
            _fail(error, name)
        _exit_with(error, f"{name}: error: {error.name} is not installed: {command}", 2, starting=starting)
    except Exception as error:
        _fail(error, name)
    ignore_signals()
    # Horovod's shutdown waits for the other ranks: half a minute and more if one was killed meanwhile.
    sys.stdout.flush()
    timer = threading.Timer(SHUTDOWN_SECONDS, os._exit, [0])
    timer.daemon = True
    timer.start()
    sys.exit(0)


def _install_command(module: str) -> str | None:
    return BUILD_COMMAND if module.partition(".")[0] == "horovod" else install_command(module)


def _exit_with(error: Exception, line: str, code: int, *, starting: bool = False) -> NoReturn:
    """Prints the line once for the job: rank 0 prints it, another rank only if rank 0 does not fail too."""
    rank = current_rank()
    if rank == 0 or isinstance(error, RankError):
        print(line, file=sys.stderr, flush=True)
    elif not isinstance(error, CollectiveError | JobError) and not _stopped_by_launcher(GRACE_SECONDS, starting):
        print(f"{line} [rank {rank} on {socket.gethostname()}]", file=sys.stderr, flush=True)
    _leave(code)


def _fail(error: Exception, name: str) -> NoReturn:
    """Prints the traceback of the first failure once.

    If ranks fail together, one prints its traceback and exits, and the launcher ends the others meanwhile.
    """
    rank = current_rank()
    where = f"{name}: rank {rank} on {socket.gethostname()}"
    grace = GRACE_SECONDS * (1 + rank / max(detect_launcher().size, rank + 1))
    if type(error).__name__ == "HorovodInternalError":  # most likely because another rank has ended
        text = f"{where} lost the connection to the other ranks: {error}\n"
    else:
        text = f"{''.join(traceback.format_exception(error))}{where} failed: {error!r}\n"
        grace *= rank > 0
    if not _stopped_by_launcher(grace):
        sys.stderr.write(text)
    _leave(1)


def _stopped_by_launcher(seconds: float, starting: bool = False) -> bool:
    """Waits for the launcher to stop this rank, as it does once another rank has printed the error and exited.

    A signal that came before is a request to stop the job, unless this rank is still starting: then rank 0, which
    started faster, has printed the error already.
    """
    before, end = stop_requested() and not starting, time.monotonic() + seconds
    while time.monotonic() < end:
        if stop_requested() and not before:
            return True
        time.sleep(0.05)
    return False


def _leave(code: int) -> NoReturn:
    """Exits at once: Horovod's shutdown would wait for ranks that are stuck in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
