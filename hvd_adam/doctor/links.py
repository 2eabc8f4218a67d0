"""The network between ranks, by plain TCP: who reaches whom, how fast, how far their clocks are apart.

Each point (the first rank of each host; on one host each rank) listens, tries to reach all others, then
measures with each: a few pings, then data for a moment in either direction. A point takes part in one
measurement at a time.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from hvd_adam.recovery.watchdog import _BAD_MESSAGE

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
BUSY_SECONDS = 5.0  # to wait for a point that measures with another
LONGEST_STREAM = 0.5  # seconds of data in one direction
PINGS = 20
PIECE = 1 << 18
AT_ONCE = 16

Peer = dict[str, Any]  # "rank", "host", "addresses", "port", "token"


class Point:
    """Listens from its construction to its end, on all of the host's addresses.

    Args:
        rank: of the job.
        host: its name.
        addresses: by which other hosts may reach it, best first.
    """

    def __init__(self, rank: int, host: str, addresses: list[str]) -> None:
        self._listener = socket.create_server(("", 0), backlog=1024)
        token = secrets.token_hex(16)
        port = self._listener.getsockname()[1]
        self.peer: Peer = {"rank": rank, "host": host, "addresses": addresses, "port": port, "token": token}
        self._busy = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def measure(self, points: list[Peer], seconds: float) -> list[dict[str, Any]]:
        """Tries to reach every other point, and measures with those of a higher rank.

        Args:
            points: all of them, this one too.
            seconds: to measure for, roughly; what is left then is left out.

        Returns:
            One entry a point: "a" and "b" (ranks), "address", and "error", or, where measured, "rtt" (seconds, the
            median), "rate" (bytes/s, the slower direction) and "ahead" (seconds that b's clock is ahead).
        """
        others = [point for point in points if point["rank"] != self.peer["rank"]]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            entries = list(pool.map(self._reach, others))
        end = time.monotonic() + seconds
        stream = min(LONGEST_STREAM, seconds / (3 * max(1, len(others))))
        for point, entry in sorted(
            zip(others, entries, strict=True), key=lambda pair: self._turn(pair[0], points)
        ):
            if point["rank"] > self.peer["rank"] and "error" not in entry and time.monotonic() < end:
                try:
                    entry |= self._with(point, entry["address"], stream)
                except _BAD_MESSAGE as error:
                    entry["error"] = f"the connection broke while it was measured ({error})"
        return entries

    def _turn(self, other: Peer, points: list[Peer]) -> int:
        """So ordered, pairs that share no point come in the same round."""
        ranks = [point["rank"] for point in points]
        return (ranks.index(self.peer["rank"]) + ranks.index(other["rank"])) % len(ranks)

    def _reach(self, peer: Peer) -> dict[str, Any]:
        entry: dict[str, Any] = {"a": self.peer["rank"], "b": peer["rank"]}
        errors = []
        for address in ["127.0.0.1"] if peer["host"] == self.peer["host"] else peer["addresses"]:
            try:
                with _request(peer, address, what="ping"):
                    return entry | {"address": address}
            except _BAD_MESSAGE as error:
                errors.append(f"{address}: {error.strerror or error}" if isinstance(error, OSError) else address)
        return entry | {"error": "; ".join(errors) or "it has no address but loopback"}

    def _with(self, peer: Peer, address: str, seconds: float) -> dict[str, Any]:
        with self._busy:
            with _request(peer, address, what="ping") as stream:
                times, ahead = zip(*(_ping(stream) for _ in range(PINGS)), strict=True)
            rates = []
            for what, transfer in (("take", _send), ("give", _receive)):
                # Points lock in the order of their ranks: none waits for one that waits for it.
                with _request(peer, address, what=what, seconds=seconds) as stream:
                    if not stream.readline():  # it has been busy with another for too long
                        return {}
                    rates.append(transfer(stream, seconds))
        fastest = times.index(min(times))
        return {"rtt": statistics.median(times), "rate": min(rates), "ahead": ahead[fastest]}

    # The listener's side.

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(*_BAD_MESSAGE), _Stream(connection) as stream:
            request = json.loads(stream.readline())
            if not hmac.compare_digest(str(request["token"]), self.peer["token"]):
                return
            if request["what"] == "ping":
                while True:
                    stream.write({"time": time.time()})
                    if not stream.readline():
                        return
            if self._busy.acquire(timeout=BUSY_SECONDS):
                try:
                    stream.write({})
                    transfer = _receive if request["what"] == "take" else _send
                    transfer(stream, min(float(request["seconds"]), LONGEST_STREAM))
                finally:
                    self._busy.release()


class _Stream:
    """A connection: lines of JSON, then raw data."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def write(self, value: Any) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def readline(self) -> bytes:
        """Up to a newline, and no byte more; what raw data follow stay. Empty at the end."""
        line = b""
        while not line.endswith(b"\n") and len(line) < 1000:
            byte = self.connection.recv(1)
            if not byte:
                return b""
            line += byte
        return line


@contextmanager
def _request(peer: Peer, address: str, **request: object) -> Iterable[_Stream]:
    with _Stream(socket.create_connection((address, peer["port"]), CONNECT_SECONDS)) as stream:
        stream.write({"token": peer["token"], **request})
        if request["what"] == "ping" and not stream.readline():
            raise ValueError("another program answers at this address")
        yield stream


def _ping(stream: _Stream) -> tuple[float, float]:
    """Seconds there and back, and how far the other's clock is ahead."""
    begin, now = time.perf_counter(), time.time()
    stream.write({})
    answer = json.loads(stream.readline())
    took = time.perf_counter() - begin
    return took, answer["time"] - (now + took / 2)


def _send(stream: _Stream, seconds: float) -> float:
    """Sends until the other side says how many bytes a second it has had."""
    connection, data = stream.connection, bytes(PIECE)
    connection.setblocking(False)
    end = time.monotonic() + seconds + ANSWER_SECONDS
    while time.monotonic() < end:
        readable, writable, _ = select.select([connection], [connection], [], 1.0)
        if readable:
            break
        if writable:
            with suppress(BlockingIOError):
                connection.send(data)
    connection.settimeout(ANSWER_SECONDS)
    rate = json.loads(stream.readline())["rate"]
    # What still lies in buffers is not sent: it would take the next measurement's room.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return rate


def _receive(stream: _Stream, seconds: float) -> float:
    """Receives for a moment, says how many bytes a second came, and lets the rest go."""
    connection, buffer, total = stream.connection, bytearray(4 * PIECE), 0
    connection.recv_into(buffer)  # time runs from the first data on
    begin = time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        count = connection.recv_into(buffer)
        if count == 0:
            raise ValueError("it ended too soon")
        total += count
    rate = total / took
    stream.write({"rate": rate})
    with suppress(OSError):  # the other side cuts the connection once it has the answer
        connection.settimeout(1.0)
        until = time.monotonic() + ANSWER_SECONDS
        while connection.recv_into(buffer) and time.monotonic() < until:
            pass
    return rate
