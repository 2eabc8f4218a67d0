"""The kernel's work for TCP, measured with a connection of this process to itself. Imports no torch."""

from __future__ import annotations

import socket
import threading
import time
from statistics import median

_BYTES = 16 * 2**20
_PIECE = 1 << 18


def tcp_seconds(repeats: int) -> float:
    """Returns the core-seconds in which the kernel sends a byte over TCP and receives it, on this host.

    A connection to the own host has no device, but all of the copies and most of the protocol.

    Args:
        repeats: of the measurement.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    data, buffer, times = bytes(_PIECE), bytearray(_PIECE), []

    def receive() -> None:
        left = _BYTES
        while left:
            left -= receiver.recv_into(buffer, min(left, _PIECE))

    with sender, receiver:
        for _ in range(repeats + 1):
            thread = threading.Thread(target=receive)
            before = time.process_time()
            thread.start()
            for _ in range(_BYTES // _PIECE):
                sender.sendall(data)
            thread.join()
            times.append((time.process_time() - before) / _BYTES)
    return median(times[1:])
