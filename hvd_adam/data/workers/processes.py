"""How the worker processes of a `WorkerLoader` start, and that they end with their rank and with nothing else.

They are forked by a server, a process without threads that the rank starts with exec. A process that has started
MPI must not fork workers itself: on kernels before 5.12 InfiniBand then reads stale memory, or the child crashes
(Horovod issue 1215).

Server and workers block the signals that the rank handles. All other code of a rank shares Python's server of the
start method "forkserver". This module starts one of its own, so that the processes of other code receive signals.
"""

import io
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from multiprocessing.forkserver import ForkServer, read_signed
from multiprocessing.process import BaseProcess

# The rank decides what these signals mean, which schedulers and terminals send to all processes of a job.
_SIGNALS_OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_server = ForkServer()


class _Popen(popen_forkserver.Popen):
    """Starts a worker by the server of this module, and can end it although it blocks SIGTERM."""

    _fds: list[int]  # of the base class: those that the worker inherits

    def _launch(self, process_obj: BaseProcess) -> None:
        # As the base class, whose server is a global variable.
        data = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), data)
            reduction.dump(process_obj, data)
        finally:
            set_spawning_popen(None)
        self.sentinel, writer = _server.connect_to_new_process(self._fds)
        kept = os.dup(writer)  # `end_with_rank` waits until this end of the pipe is closed
        self.finalizer = util.Finalize(self, _close_files, (kept, self.sentinel))
        with open(writer, "wb") as file:
            file.write(data.getbuffer())
        self.pid = read_signed(self.sentinel)

    def terminate(self) -> None:
        """Sends SIGKILL: multiprocessing calls this at exit and then waits without a limit."""
        self.kill()


def _close_files(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Worker(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Context(ForkServerContext):
    Process = _Worker


context = _Context()


def start_server(*modules: str) -> None:
    """Starts the server, unless it runs, without waiting for it.

    Args:
        modules: what it imports before it forks the first worker, so that no worker has to.
    """
    _server.set_forkserver_preload(list(modules))
    with starting():
        _server.ensure_running()


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
