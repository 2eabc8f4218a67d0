"""Authenticated requests between processes of a job over plain TCP, independent of Horovod.

A request is one line of JSON with a token, which the server has given to the other processes of its job; a server
closes connections without it. What follows the request is up to the caller: lines of JSON, or raw data. The
standard library is enough.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# What a connection can end in if the other side is gone, or is none of this job's processes.
BAD_MESSAGE = (OSError, ValueError, TypeError, KeyError, RecursionError)

LONGEST_REQUEST = 1000  # bytes
_CLOSE_SECONDS = 5.0  # for the thread that listens to end
_RETRY_SECONDS = 1.0  # after a failed accept, for instance without a free file descriptor or thread

Request = dict[str, Any]  # what JSON can hold


class JsonStream:
    """A TCP connection that carries lines of JSON and, between them, raw data through `connection`.

    Args:
        connection: a connected socket; closed at the end of the `with` block.
        timeout: of every operation, in seconds.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.connection = connection
        connection.settimeout(timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> JsonStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def write(self, value: Any) -> None:
        """Sends one line of JSON."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def readline(self, limit: int = LONGEST_REQUEST) -> bytes:
        """Returns the next line and leaves the data after it in the socket; empty if the connection has ended.

        Args:
            limit: bytes after which a line without an end is cut.
        """
        line = b""
        while not line.endswith(b"\n") and len(line) < limit:
            waiting = self.connection.recv(limit - len(line), socket.MSG_PEEK)
            if not waiting:
                return b""
            line += self.connection.recv(waiting.find(b"\n") + 1 or len(waiting))
        return line


class PeerServer:
    """Listens from its construction to `close` and answers each request in a thread of its own.

    Args:
        handle: called with the request and the stream that it came from. `BAD_MESSAGE` errors end the connection.
        host: the address to listen at; all addresses by default.
        timeout: of every operation on a connection, in seconds.

    Attributes:
        port: where the server listens.
        token: what a request must carry.
    """

    def __init__(self, handle: Callable[[Request, JsonStream], None], host: str = "", *, timeout: float) -> None:
        self._handle, self._timeout = handle, timeout
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._closed = False
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._thread = _start_thread(self._accept)

    def close(self) -> None:
        """Stops listening; a request that arrives from now on gets no answer."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(_CLOSE_SECONDS)

    def _accept(self) -> None:
        with self._listener:
            while not self._closed:
                try:
                    connection, _ = self._listener.accept()
                    _start_thread(self._serve, connection)
                except (OSError, RuntimeError):  # the latter: no more threads
                    time.sleep(0 if self._closed else _RETRY_SECONDS)

    def _serve(self, connection: socket.socket) -> None:
        with suppress(*BAD_MESSAGE), connection, JsonStream(connection, self._timeout) as stream:
            request = json.loads(stream.readline())
            if hmac.compare_digest(str(request["token"]), self.token) and not self._closed:
                self._handle(request, stream)


@contextmanager
def send_request(
    address: str, port: int, token: str, request: Request, *, connect_timeout: float, timeout: float
) -> Iterator[JsonStream]:
    """Connects to a `PeerServer`, sends a request, and yields the stream for what follows.

    Args:
        address: of the host of the server.
        port: of the server.
        token: of the server.
        request: what to ask.
        connect_timeout: seconds to wait for the connection.
        timeout: of every operation after that, in seconds.

    Raises:
        OSError: the server cannot be reached.
    """
    with JsonStream(socket.create_connection((address, port), connect_timeout), timeout) as stream:
        stream.write({"token": token} | request)
        yield stream


def host_addresses() -> tuple[str, ...]:
    """Returns the IPv4 addresses of the interfaces of this host that are up, without loopback.

    Without psutil (in the extra `horovod`) an interface's secondary addresses are left out.
    """
    try:
        import psutil  # here: the doctor runs without it
    except ModuleNotFoundError:
        found = [_primary_address(name) for _, name in socket.if_nameindex()]
    else:
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        every = [item for name, items in psutil.net_if_addrs().items() if name in up for item in items]
        found = [item.address for item in every if item.family == socket.AF_INET]
    return tuple(address for address in found if address and not address.startswith("127."))


def _primary_address(interface: str) -> str | None:
    """Asks the kernel for an interface's IPv4 address; None if it has none or is down (netdevice(7))."""
    get_address, get_flags, flag_up = 0x8915, 0x8913, 1
    request = struct.pack("256s", interface.encode()[:15])
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        (flags,) = struct.unpack_from("H", fcntl.ioctl(probe, get_flags, request), 16)
        if flags & flag_up:
            return socket.inet_ntoa(fcntl.ioctl(probe, get_address, request)[20:24])
    return None


def _start_thread(target: Callable[..., None], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=arguments, name="hvd_adam.peer_server", daemon=True)
    thread.start()
    return thread
