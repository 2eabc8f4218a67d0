"""Run horovodrun and exit with the code of the rank that failed, instead of a traceback and 1.

    python -m hvd_adam.launch.horovodrun -np 2 python -m hvd_adam.train

The launch scripts run it by its path. It then uses the package that it lies in; the Python that trains need not
have one.

With the Gloo controller, horovodrun raises a RuntimeError that contains the exit code (launch_gloo in gloo_run.py
of Horovod 0.28.1). The ranks' output has passed by then, so nothing is lost without that traceback. Any other
exception is not caught.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import horovod
    import psutil
    from horovod.runner import gloo_run, launch
    from horovod.runner.common.util.env import is_exportable
    from horovod.runner.driver import driver_service
    from horovod.runner.elastic.registration import WorkerStateRegistry
    from horovod.runner.elastic.worker import WorkerNotificationClient
    from horovod.runner.util import remote
except ModuleNotFoundError as error:
    missing = "Horovod" if error.name == "horovod" else f"the package {error.name}"
    print(
        f"horovodrun.sh: error: {sys.executable} does not have {missing}: "
        "run 'bash launch/setup.sh', or set HVD_ADAM_PYTHON to a Python that has it",
        file=sys.stderr,
    )
    sys.exit(2)

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from hvd_adam.distributed.rendezvous import LOSSES_KEY, LOSSES_SCOPE, REPORTS_LOSSES_VARIABLE
from hvd_adam.launch.horovod_helpers import (
    patch,
    patch_helper,
    signal_helpers,
    start_helpers_with_signals_blocked,
    wait_without_reaping,
)
from hvd_adam.launch.interfaces import usable_interfaces
from hvd_adam.launch.signal_proxy import ECHO_SECONDS

RANK_FAILED = re.compile(r"one or more processes exited with non-zero status.*Exit code: (-?\d+)", re.DOTALL)
UNREACHABLE = "could not connect to some hosts via ssh"

SIGNAL_PROXY = (sys.executable, "-I", str(Path(__file__).with_name("signal_proxy.py")))

# Without these, ssh never notices that a host has become unreachable.
KEEP_ALIVE = " -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"

# What Horovod's library contains if it was built with a controller, by the function that asks it.
CONTROLLERS = {
    "gloo_built": b"horovod6common11GlooContext10Initialize",
    "mpi_built": b"horovod6common10MPIContext10Initialize",
}

SHELL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # other variables do not pass through sh

INTERRUPTED = 128 + signal.SIGINT  # exit code after Ctrl-C
_interrupted = threading.Event()  # set by Ctrl-C
_execve = os.execve
_get_local_interfaces: Callable[[Any], set[str]] = driver_service.get_local_interfaces


def execve_without_shell(path: str, arguments: list[str], environment: Mapping[str, str]) -> None:
    """Replaces os.execve, with which horovodrun becomes ``sh -c mpirun...``: the shell is replaced by mpirun.

    Otherwise a signal reaches only the shell, which exits or waits and leaves mpirun and the ranks running. mpirun
    runs under signal_proxy.py, which forwards SIGTERM to the ranks; mpirun itself does not.
    """
    *options, command = arguments
    dropped = sorted(name for name in environment if is_exportable(name) and not SHELL_NAME.fullmatch(name))
    for name in dropped:  # mpirun would warn of each
        command = command.replace(f" -x {name} ", " ", 1)
    if dropped:
        print(
            f"horovodrun.sh: warning: the ranks do not get {', '.join(dropped)}: sh drops environment variables "
            "with other characters than letters, digits and _ in their names; rename them, or use --gloo",
            file=sys.stderr,
            flush=True,
        )
    _execve(path, [*options, f"exec {shlex.join(SIGNAL_PROXY)} {command}"], environment)


patch(psutil.Process, "wait", wait_without_reaping)  # at import: helpers need it too
if __name__ == "__mp_main__":
    patch_helper()


def find_controllers_without_torch() -> None:
    """Looks for Horovod's controllers in its library: to ask it, horovodrun imports PyTorch first, in 2 s.

    If a controller is not found this way, Horovod's own check decides.
    """
    for library in Path(horovod.__file__).parent.glob("torch/mpi_lib_v2*.so"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name, symbol in CONTROLLERS.items():
                if content.find(symbol) >= 0:
                    patch(launch, name, lambda verbose=False: True)


def report_losses() -> None:
    """Puts a mark into the ranks' key-value store when a rank ends, for ranks that wait for it to connect.

    See hvd_adam/distributed/rendezvous.py. The store is emptied whenever ranks are assigned again, and Horovod
    waits for this.
    """
    record_failure: Callable[[Any, str, int], int] = WorkerStateRegistry.record_failure

    def record_and_report(registry: Any, host: str, slot: int) -> int:
        registry._action_event.wait()  # an assignment in progress does not take this failure into account
        server = registry._driver._rendezvous._httpd
        with server.cache_lock:
            server.cache.setdefault(LOSSES_SCOPE, {})[LOSSES_KEY] = b"1"
        return record_failure(registry, host, slot)

    patch(WorkerStateRegistry, "record_failure", record_and_report)
    os.environ[REPORTS_LOSSES_VARIABLE] = "1"


def notify_in_threads() -> None:
    """Notifies each rank in its own thread: a rank on a host that has just died would delay the others by 80 s."""
    notify_hosts_updated = WorkerNotificationClient.notify_hosts_updated

    def notify(*arguments: Any) -> None:
        with suppress(Exception):  # as Horovod's driver does: the rank may have ended
            notify_hosts_updated(*arguments)

    def start_notifying(*arguments: Any) -> None:
        threading.Thread(target=notify, args=arguments, daemon=True).start()

    patch(WorkerNotificationClient, "notify_hosts_updated", start_notifying)


def accept_interfaces_of_local_ranks() -> None:
    """Lets ranks on this host alone use the --network-interfaces given; Horovod accepts only loopback."""

    def get_local_interfaces(settings: Any) -> set[str]:
        if not settings.nics:
            return _get_local_interfaces(settings)
        return usable_interfaces(settings.nics, "horovodrun.sh")

    patch(driver_service, "get_local_interfaces", get_local_interfaces)


def require_mpirun() -> None:
    """Exits with one line if there is no mpirun, where Horovod raises an exception."""
    mpi_run: Callable[..., Any] = launch.mpi_run

    def run_or_exit(*arguments: Any) -> Any:
        if shutil.which("mpirun") is None:
            print(
                "horovodrun.sh: error: no mpirun found: run 'bash launch/setup.sh', load your cluster's MPI "
                "module, or use --gloo",
                file=sys.stderr,
            )
            sys.exit(2)
        return mpi_run(*arguments)

    patch(launch, "mpi_run", run_or_exit)


def let_ranks_save() -> None:
    """Gives ranks time for a checkpoint after SIGTERM and Ctrl-C, which Horovod with Gloo forwards as SIGTERM.

    Also records Ctrl-C, for the exit code of the job.
    """
    register_shutdown_event = gloo_run.register_shutdown_event

    def register_and_record() -> threading.Event:
        event: threading.Event = register_shutdown_event()
        last = -math.inf

        def stop(number: int, _: object) -> None:
            nonlocal last
            if number == signal.SIGINT:
                _interrupted.set()
            if time.monotonic() - last > ECHO_SECONDS:
                signal_helpers()
            last = time.monotonic()
            event.set()

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
        return event

    patch(gloo_run, "register_shutdown_event", register_and_record)


def main() -> None:
    """Runs horovodrun's command line.

    Exits with the failed rank's code (128 + n for signal n), 130 instead after Ctrl-C, and 1 if ssh fails.
    """
    patch(os, "execve", execve_without_shell)
    find_controllers_without_torch()
    report_losses()
    notify_in_threads()
    accept_interfaces_of_local_ranks()
    require_mpirun()
    let_ranks_save()
    start_helpers_with_signals_blocked()
    remote.SSH_COMMAND_PREFIX += KEEP_ALIVE
    # horovodrun forwards only SIGTERM and would be killed by these. To the ranks all four mean: save and stop.
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: by nohup
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        launch.run_commandline()
    except KeyboardInterrupt:  # before there are ranks
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        if _interrupted.is_set():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more must not change the exit code
            threading.excepthook = lambda _: None
            sys.exit(INTERRUPTED)
        if str(error) == UNREACHABLE:
            sys.exit(f"horovodrun.sh: {error}: see above; each host must accept ssh without a password")
        failed = RANK_FAILED.search(str(error))
        if failed is None:
            raise
        code = int(failed[1])
        # Threads of horovodrun that still run are killed now: their tracebacks would be of no use to the user.
        threading.excepthook = lambda _: None
        sys.exit(code if code >= 0 else 128 - code)


# The guard is essential: horovodrun starts helper processes with multiprocessing's "spawn", which import this
# module again under the name __mp_main__.
if __name__ == "__main__":
    main()
