"""The client of `forked_python.py`. Imports little, to start fast."""

import json
import os
import signal
import socket
import struct
from contextlib import suppress

NAMESPACES = ("net", "uts", "ipc", "pid", "mnt")  # the last one changes what /proc shows
FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run(address: str, argv: list[str]) -> None:
    """Runs `python ARGV` in a fork of the server at a socket's path, and ends this process as the fork ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a fork to forward to
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"argv": argv, "environ": dict(os.environ), "folder": os.getcwd()}
    request["cores"] = list(os.sched_getaffinity(0))
    request["namespaces"] = NAMESPACES
    namespaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    socket.send_fds(server, [b"-"], [0, 1, 2, *namespaces])
    server.sendall(json.dumps(request).encode() + b"\n")

    def forward(number: int, _: object) -> None:
        with suppress(BrokenPipeError):  # the fork has ended: how, is read below
            server.sendall(bytes([number]))

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    end = server.recv(4)
    (code,) = struct.unpack("i", end) if end else (-signal.SIGKILL,)
    if code < 0:
        if -code in FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
