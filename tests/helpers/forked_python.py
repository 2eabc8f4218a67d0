"""A Python that starts fast: each process is a fork of one that has imported PyTorch and Horovod.

    subprocess.run([forked_python(), "-m", "hvd_adam.train", "--help"])
    subprocess.run(["horovodrun", "-np", "2", forked_python(), "script.py"])

The imports take two seconds of CPU time in each process: more than the training of most tests. Here they happen
once, in a server. What a launcher or a test starts is the client `fork_client.py`: it hands its arguments,
environment, folder, cores and streams to the server, forwards signals to the fork, and ends as the fork ends, with
its exit code or by its signal. If the client is killed, so is the fork.

A client on a host made of namespaces (`helpers.cluster.hosts`) gets a fork on that host. The fork has what the
server has imported, whatever that host has in its folders. Not for tests of how a process starts (`--help` without
PyTorch), or of launchers. All forks of a server have the same hashes of strings. HVD_ADAM_FORKS=0 starts new
processes instead, in all tests.
"""

import atexit
import ctypes
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from hvd_adam.loading import loading_modules

ROOT = Path(__file__).parents[2]
PRELOADED = (
    *(
        "hvd_adam.training.trainer",
        "hvd_adam.training.evaluation",
        "hvd_adam.predict.command",
        "horovod.torch",
        "jsonargparse",
        "sklearn",
    ),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "tensorboard.compat.proto.event_pb2"),
    *("tensorboard.plugins.hparams.summary_v2", "tensorboard.plugins.text.summary_v2"),
)

# What the launch scripts run besides ranks is a new process.
PROGRAM = """#!{python} -IS
import os, sys
arguments = sys.argv[1:]
if "-I" in arguments[:1] or "/hvd_adam/launch/" in "".join(arguments[:1]) or "hvd_adam.launch." in arguments[1:2]:
    os.execv("{python}", ["{python}", *arguments])
sys.path.insert(0, "{helpers}")
import fork_client
fork_client.run("{socket}", arguments)
"""


class ForkServer:
    """The server's process, and the command that starts a fork.

    Args:
        preload: further modules to import.

    Attributes:
        python: the path of a program that takes the place of `sys.executable`. Next to it is a `horovodrun` that
            does not import PyTorch in a new process to check its own build.
    """

    def __init__(self, *preload):
        self._folder = tempfile.TemporaryDirectory(prefix="forks-")
        path = f"{self._folder.name}/socket"
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, path, *preload]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._server = subprocess.Popen(command, env=environ, start_new_session=True, **streams)
        assert self._server.stdout.readline() == b"ready\n"
        self.python = f"{self._folder.name}/python"
        names = {"python": sys.executable, "helpers": Path(__file__).parent, "socket": path}
        Path(self.python).write_text(PROGRAM.format(**names))
        horovodrun = Path(self._folder.name, "horovodrun")
        horovodrun.write_text(
            f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("horovodrun.py")} "$@"\n'
        )
        for program in (Path(self.python), horovodrun):
            program.chmod(0o755)

    def close(self):
        """Ends the server; a second call does nothing."""
        self._server.stdin.close()
        self._server.wait(timeout=250)
        self._server.stdout.close()
        self._folder.cleanup()


@cache
def _shared_server():
    server = ForkServer()
    atexit.register(server.close)
    return server


def forked_python():
    """Returns the path of a program that takes the place of `sys.executable`.

    It is `sys.executable` itself where HVD_ADAM_FORKS is 0, and on a machine with a GPU: CUDA does not work in a
    fork of a process that has looked for GPUs.
    """
    forks = os.environ.get("HVD_ADAM_FORKS", "1") != "0" and not Path("/dev/nvidiactl").exists()
    return _shared_server().python if forks else sys.executable


class Forks:
    """The forks that run, with the connections of their clients."""

    def __init__(self, listener):
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)
        self._selector.register(listener, selectors.EVENT_READ, self._start)
        self._processes = os.open("/proc/self/ns/pid", os.O_RDONLY)

    def serve(self):
        """Forks for every connection until stdin is closed; returns in the forks, with the arguments of Python."""
        print("ready", flush=True)
        while True:
            for key, _ in self._selector.select():
                registered = self._selector.get_map().get(key.fd) is key  # still, after the events before it
                if registered and (arguments := key.data(key.fileobj)):
                    return arguments

    def _start(self, listener):
        connection, _ = listener.accept()
        _, received, _, _ = socket.recv_fds(connection, 1, 8)
        with connection.makefile("rb") as line:
            request = json.loads(line.readline())
        streams, namespaces = received[:3], dict(zip(request.pop("namespaces"), received[3:], strict=True))
        host = namespaces.pop("pid")
        if elsewhere := is_foreign("pid", host):
            enter(host)  # with the next child
        child = os.fork()
        if child == 0:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            connection.close()
            return become(streams, namespaces, **request)
        if elsewhere:
            enter(self._processes)
        for each in received:
            os.close(each)
        end = os.pidfd_open(child)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._signal, child))
        self._selector.register(end, selectors.EVENT_READ, partial(self._report, child, connection))
        return None

    def _signal(self, child, connection):
        """Sends a fork the signals that its client has received, and SIGKILL if the client has ended."""
        numbers = connection.recv(64)
        for number in numbers or [signal.SIGKILL]:
            os.kill(child, number)
        if not numbers:
            self._selector.unregister(connection)

    def _report(self, child, connection, end):
        """Sends the client how its fork has ended."""
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(OSError):  # the client was killed
            connection.sendall(struct.pack("i", code))
            connection.shutdown(socket.SHUT_RD)  # signals that the client sends from now on fail there
            connection.recv(64)  # those from before, with which unread the client could not read the code
        with suppress(KeyError):
            self._selector.unregister(connection)
        self._selector.unregister(end)
        connection.close()
        os.close(end)

    def _end(self, _):
        os._exit(0)


def is_foreign(kind, namespace):
    """Returns whether an open namespace is not that of this process."""
    return os.fstat(namespace).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino


def enter(namespace):
    """Moves this process into an open namespace; of processes, only those that it starts from now on."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "cannot enter the namespace of a client")


def become(streams, namespaces, argv, environ, folder, cores):
    """Gives this process what a new Python would have, and returns its arguments."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for kind, namespace in namespaces.items():
        if is_foreign(kind, namespace):
            enter(namespace)
        os.close(namespace)
    os.setsid()
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    os.sched_setaffinity(0, cores)
    sys.dont_write_bytecode = bool(environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.stdout.reconfigure(write_through=bool(environ.get("PYTHONUNBUFFERED")))
    own = {str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")}
    paths = [path for path in environ.get("PYTHONPATH", "").split(":") if path]
    sys.path[:] = [*paths, *(path for path in sys.path if path not in own)]
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import numpy
    import torch

    numpy.random.seed()
    torch.set_num_threads(int(environ.get("OMP_NUM_THREADS", len(cores))))
    return argv


def run(argv):
    """Runs `python ARGV`: a module, code or a script."""
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if argv[0] == "-c":
        sys.path.insert(0, "")
        sys.argv, code, name = ["-c", *argv[2:]], argv[1], "<string>"
    else:
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        sys.argv, code, name = argv, Path(argv[0]).read_bytes(), argv[0]
        main.__file__ = name
    exec(compile(code, name, "exec", dont_inherit=True), vars(main))


def end_as_a_program(argv):
    """Runs `python ARGV` and exits.

    What Python frees at its end is left to the system: a fork would first have to copy it.
    """
    code, interrupted = 0, False
    try:
        run(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int | None) else 1
        if error.code != code:
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted, trace = 1, isinstance(error, KeyboardInterrupt), error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    threading._shutdown()  # waits for threads, before the exit functions as in Python
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as listener, loading_modules():
        for name in (*PRELOADED, *sys.argv[2:]):
            importlib.import_module(name)
        listener.bind(sys.argv[1])
        listener.listen(64)
        arguments = Forks(listener).serve()
    end_as_a_program(arguments)
