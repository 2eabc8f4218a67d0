"""Measures the network between ranks over plain TCP: reachability, bandwidth, latency and clock differences.

Each point (the first rank of each host; on one host each rank) listens, tries to reach all others, then measures
with each: a few pings, then a short stream of data in either direction. A point takes part in one measurement at a
time. The standard library is enough.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from hvd_adam.recovery.peer_server import BAD_MESSAGE, JsonStream, PeerServer, Request, send_request

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 10.0
BUSY_SECONDS = 5.0  # to wait for a point that measures with another
LONGEST_STREAM = 0.5  # seconds of data in one direction
TURNS = 5  # parts of a stream; its rate is their median
PINGS = 20
CHUNK = 1 << 18  # bytes
CONCURRENT_REQUESTS = 16

Peer = dict[str, Any]  # "rank", "host", "addresses", "port", "token"


class Point:
    """One end of measurements; listens from its construction to the end of the process, on all addresses.

    Args:
        rank: in the job.
        host: name of the host.
        addresses: at which other hosts may reach it, best first.
    """

    def __init__(self, rank: int, host: str, addresses: list[str]) -> None:
        self._busy = threading.Lock()
        server = PeerServer(self._answer, timeout=ANSWER_SECONDS)
        self.peer: Peer = {
            "rank": rank,
            "host": host,
            "addresses": addresses,
            "port": server.port,
            "token": server.token,
        }

    def measure(self, points: list[Peer], seconds: float) -> list[dict[str, Any]]:
        """Tries to reach every other point, and measures with those of a higher rank.

        Args:
            points: all points, including this one.
            seconds: approximate duration; what remains after it is not measured.

        Returns:
            One entry for each other point: "a" and "b" (ranks), "address", and either "error" or, if measured,
            "rtt" (median, seconds), "rate" (bytes/s of the slower direction) and "ahead" (seconds by which b's
            clock is ahead of a's).
        """
        others = [point for point in points if point["rank"] != self.peer["rank"]]
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            entries = list(pool.map(self._reach, others))
        end = time.monotonic() + seconds
        stream = min(LONGEST_STREAM, seconds / (3 * max(1, len(others))))
        pairs = sorted(zip(others, entries, strict=True), key=lambda pair: self._round(pair[0], points))
        for point, entry in pairs:
            if point["rank"] > self.peer["rank"] and "error" not in entry and time.monotonic() < end:
                try:
                    entry |= self._measure_with(point, entry["address"], stream)
                except BAD_MESSAGE as error:
                    entry["error"] = f"the connection broke during the measurement ({error})"
        return entries

    def _round(self, other: Peer, points: list[Peer]) -> int:
        """Returns the round in which to measure with another point; pairs of one round share no point."""
        ranks = [point["rank"] for point in points]
        return (ranks.index(self.peer["rank"]) + ranks.index(other["rank"])) % len(ranks)

    def _reach(self, peer: Peer) -> dict[str, Any]:
        entry: dict[str, Any] = {"a": self.peer["rank"], "b": peer["rank"]}
        errors = []
        for address in ["127.0.0.1"] if peer["host"] == self.peer["host"] else peer["addresses"]:
            try:
                with _request(peer, address, what="ping"):
                    return entry | {"address": address}
            except BAD_MESSAGE as error:
                errors.append(f"{address}: {error.strerror or error}" if isinstance(error, OSError) else address)
        return entry | {"error": "; ".join(errors) or "it has no address but loopback"}

    def _measure_with(self, peer: Peer, address: str, seconds: float) -> dict[str, Any]:
        with self._busy:
            with _request(peer, address, what="ping") as stream:
                times, ahead = zip(*(_ping(stream) for _ in range(PINGS)), strict=True)
            rates = []
            for what, transfer in (("take", _send), ("give", _receive)):
                # Points lock in the order of their ranks, so that no two points wait for each other.
                with _request(peer, address, what=what, seconds=seconds) as stream:
                    if not stream.readline():  # it was busy with another point for too long
                        return {}
                    rates.append(transfer(stream, seconds))
        fastest = times.index(min(times))
        return {"rtt": statistics.median(times), "rate": min(rates), "ahead": ahead[fastest]}

    def _answer(self, request: Request, stream: JsonStream) -> None:
        """Takes part in a measurement that another point has requested."""
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


@contextmanager
def _request(peer: Peer, address: str, **request: object) -> Iterator[JsonStream]:
    with send_request(
        address,
        peer["port"],
        peer["token"],
        request,
        connect_timeout=CONNECT_SECONDS,
        timeout=ANSWER_SECONDS,
    ) as stream:
        if request["what"] == "ping" and not stream.readline():
            raise ValueError("another program answers at this address")
        yield stream


def _ping(stream: JsonStream) -> tuple[float, float]:
    """Returns the round-trip time and how far the other clock is ahead, both in seconds."""
    begin, now = time.perf_counter(), time.time()
    stream.write({})
    answer = json.loads(stream.readline())
    took = time.perf_counter() - begin
    return took, answer["time"] - (now + took / 2)


def _send(stream: JsonStream, seconds: float) -> float:
    """Sends until the other side reports the rate at which it has received, in bytes/s, and returns the rate."""
    connection, data = stream.connection, bytes(CHUNK)
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
    rate = float(json.loads(stream.readline())["rate"])
    # Discard what is still in buffers: it would take bandwidth from the next measurement.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return rate


def _receive(stream: JsonStream, seconds: float) -> float:
    """Receives for some seconds, reports and returns the rate in bytes/s, and discards the rest.

    The rate is the median of several turns, so that it does not depend on a single interruption.
    """
    connection, buffer = stream.connection, bytearray(4 * CHUNK)
    connection.recv_into(buffer)  # the measurement starts with the first data
    rate = statistics.median(_receive_turn(connection, buffer, seconds / TURNS) for _ in range(TURNS))
    stream.write({"rate": rate})
    with suppress(OSError):  # the other side resets the connection once it has the answer
        connection.settimeout(1.0)
        until = time.monotonic() + ANSWER_SECONDS
        while connection.recv_into(buffer) and time.monotonic() < until:
            pass
    return rate


def _receive_turn(connection: socket.socket, buffer: bytearray, seconds: float) -> float:
    """Receives for some seconds, at least once; returns the rate in bytes/s."""
    total, took, begin = 0, 0.0, time.perf_counter()
    while took < seconds:
        count = connection.recv_into(buffer)
        if count == 0:
            raise ValueError("it ended too soon")
        total += count
        took = time.perf_counter() - begin
    return total / took
