"""Client for the key-value store that horovodrun serves over HTTP, through which the ranks of Gloo meet.

`rendezvous` and the doctor use it before Horovod is started. Needs the standard library only.
"""

from __future__ import annotations

import socket
from http.client import HTTPConnection

# TCP keep-alive: seconds until the first probe and between probes, and how many may stay unanswered.
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 3


class KeyValueStore:
    """Values of text under a scope and a key.

    Connects directly to the store: proxies named in the environment are ignored.

    Args:
        host: name or address of the launcher's host.
        port: the store's TCP port.
        connect_timeout: seconds to wait for a connection.
        answer_timeout: seconds to wait for an answer. None waits for as long as the launcher's host answers TCP
            keep-alive probes, for requests that the launcher holds until other ranks have made theirs.
    """

    def __init__(self, host: str, port: int, *, connect_timeout: float, answer_timeout: float | None) -> None:
        self._host, self._port = host, port
        self._connect_timeout, self._answer_timeout = connect_timeout, answer_timeout

    def get(self, scope: str, key: str) -> str | None:
        """Returns the value, or None if there is none.

        Raises:
            OSError: the store cannot be reached, or does not answer in time.
            HTTPException: the answer is not HTTP.
        """
        status, text = self._request("GET", scope, key)
        return text if status == 200 else None

    def put(self, scope: str, key: str, value: str) -> None:
        """Stores a value, in place of an earlier one.

        Raises:
            OSError: the store cannot be reached, does not answer in time, or refuses the value.
            HTTPException: the answer is not HTTP.
        """
        status, _ = self._request("PUT", scope, key, value)
        if status != 200:
            raise OSError(f"the key-value store at {self._host}:{self._port} answers PUT with status {status}")

    def _request(self, method: str, scope: str, key: str, value: str | None = None) -> tuple[int, str]:
        connection = HTTPConnection(self._host, self._port, timeout=self._connect_timeout)
        try:
            connection.connect()
            connection.sock.settimeout(self._answer_timeout)
            if self._answer_timeout is None:
                _enable_keep_alive(connection.sock)
            connection.request(method, f"/{scope}/{key}", None if value is None else value.encode("utf-8"))
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8")
        finally:
            connection.close()


def _enable_keep_alive(connection: socket.socket) -> None:
    """Makes a read fail once the other host is unreachable."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
