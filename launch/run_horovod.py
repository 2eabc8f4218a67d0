"""horovodrun with the exit code of the rank that failed, where horovodrun ends with a traceback and 1.

With the Gloo controller horovodrun raises a RuntimeError that holds the code (launch_gloo in gloo_run.py of
Horovod 0.28.1). What the ranks wrote has passed by then, so nothing is lost with that traceback. Any other
stays as it is.
"""

import os
import re
import shlex
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from horovod.runner.elastic.registration import WorkerStateRegistry
from horovod.runner.elastic.worker import WorkerNotificationClient
from horovod.runner.launch import run_commandline
from horovod.runner.util import remote

RANK_FAILED = re.compile(r"one or more processes exited with non-zero status.*Exit code: (-?\d+)", re.DOTALL)
UNREACHABLE = "could not connect to some hosts via ssh"

PASS_SIGNALS = (sys.executable, "-I", str(Path(__file__).with_name("pass_signals.py")))

# A host that is cut off must be noticed: ssh, by itself, would wait for it for ever.
KEEP_ALIVE = " -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"

execute = os.execve


def execute_without_shell(path: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Stands in for os.execve, with which horovodrun becomes ``sh -c mpirun...``: the shell becomes mpirun.

    Otherwise a signal reaches the shell alone, which ends, or waits, and leaves mpirun and the ranks running.
    pass_signals.py hands SIGTERM on to them, which mpirun does not.
    """
    *options, command = arguments
    execute(path, [*options, f"exec {shlex.join(PASS_SIGNALS)} {command}"], environment)


def wait_and_leave(process: psutil.Process, timeout: float | None = None) -> int | None:
    """Stands in for psutil.Process.wait, which takes a child's exit code away from who asks for it afterwards.

    So Horovod's helper may do with a rank that it ends: Popen.wait then says 0, and the job seems to be done.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise psutil.TimeoutExpired(timeout, process.pid)
            time.sleep(0.02)
    except ChildProcessError:  # somebody else's
        return wait(process, timeout)
    return None


wait = psutil.Process.wait
psutil.Process.wait = wait_and_leave  # in the helpers too, which import this file


def tell_of_losses() -> None:
    """Puts into the ranks' key-value store that a rank has ended, for those that wait for it to connect.

    See hvd_adam/distributed/rendezvous.py. The store is emptied when places are given out again, and Horovod waits
    for that.
    """
    record_failure = WorkerStateRegistry.record_failure

    def tell(registry: WorkerStateRegistry, host: str, slot: int) -> int:
        registry._action_event.wait()  # what is given out at this moment does not know of it yet
        server = registry._driver._rendezvous._httpd
        with server.cache_lock:
            server.cache.setdefault("hvd_adam_gone", {})["any"] = b"1"
        return record_failure(registry, host, slot)

    WorkerStateRegistry.record_failure = tell
    os.environ["HVD_ADAM_TOLD_OF_LOSSES"] = "1"


def notify_beside() -> None:
    """Tells ranks of other hosts in a thread: one on a host that has just died would keep all waiting for 80 s."""
    notify_hosts_updated = WorkerNotificationClient.notify_hosts_updated

    def attempt(*arguments: object) -> None:
        with suppress(Exception):  # as Horovod's driver has it: the rank may be gone
            notify_hosts_updated(*arguments)

    WorkerNotificationClient.notify_hosts_updated = lambda *arguments: threading.Thread(
        target=attempt, args=arguments, daemon=True
    ).start()


def main() -> None:
    """Runs horovodrun's command line; ends with a rank's code (128 + n for signal n), 1 without ssh to a host."""
    os.execve = execute_without_shell
    tell_of_losses()
    notify_beside()
    remote.SSH_COMMAND_PREFIX += KEEP_ALIVE
    # horovodrun hands on SIGTERM only, and would die of these; to the ranks all three say the same: save and stop.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run_commandline()
    except RuntimeError as error:
        if str(error) == UNREACHABLE:
            sys.exit(f"horovodrun.sh: {error}: see above; each host must accept ssh without a password")
        failed = RANK_FAILED.search(str(error))
        if failed is None:
            raise
        code = int(failed[1])
        # Threads of horovodrun that still run are cut off now: "Exception in thread" would tell the user nothing.
        threading.excepthook = lambda _: None
        sys.exit(code if code >= 0 else 128 - code)


# The guard matters: horovodrun starts helpers that import this file anew, as another module.
if __name__ == "__main__":
    main()
