"""How the worker processes of a `WorkerLoader` start, and that they end with their rank and with nothing else.

They are forked by a server, a process without threads that the rank starts with exec. A process that has started
MPI must not fork workers itself: on kernels before 5.12 InfiniBand then reads stale memory, or the child crashes
(Horovod issue 1215).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, forkserver, get_context, parent_process, resource_tracker

# The rank decides what these signals mean, which schedulers and terminals send to all processes of a job.
_SIGNALS_OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

context = get_context("forkserver")


def start_server(*modules: str) -> None:
    """Starts the server, unless it runs, without waiting for it.

    Args:
        modules: what it imports before it forks the first worker, so that no worker has to.
    """
    context.set_forkserver_preload(list(modules))
    with starting():
        forkserver.ensure_running()


@contextmanager
def starting() -> Iterator[None]:
    """Processes that start in this block never receive the signals that the rank handles."""
    _start_tracker()  # otherwise the server's start does it, which would unblock the signals
    # Blocked rather than ignored: a signal that arrives meanwhile is delivered to the rank afterwards. The server
    # and its workers inherit the mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_RANK)
    # torch's handler raises the death of a worker in the middle of whatever the rank does. Without it the next
    # batch does, within seconds.
    on_child = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Starts the process that removes semaphores of this one, unless it runs.

    A rank that ends with an error leaves semaphores to it: there is no need to warn of them after the error.
    """
    given = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [given, "ignore:resource_tracker:UserWarning"]))
    try:
        resource_tracker.ensure_running()
    finally:
        if given is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = given


def end_with_rank(_: int) -> None:
    """Runs in a new worker: it ends as soon as its rank does, however that ends."""
    rank = parent_process()
    assert rank is not None  # this is a child

    def watch() -> None:
        connection.wait([rank.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="hvd_adam.rank", daemon=True).start()
