"""Requests between the ranks of a job, which work while a rank's main thread waits in Horovod.

Each rank listens at a port of its own, on loopback if all ranks are on one host. It answers only requests that
carry its token, which the other ranks have.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.recovery.peer_server import JsonStream, PeerServer, Request, host_addresses, send_request

CONNECT_SECONDS = 2.0  # for a connection to one address of another rank
ANSWER_SECONDS = 5.0  # for another rank's answer; a frozen rank accepts the connection and never answers
CONCURRENT_REQUESTS = 16
LONGEST_ANSWER = 1 << 20  # bytes

Answer = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True)
class _Peer:
    host: str
    addresses: tuple[str, ...]
    port: int
    token: str


class Peers:
    """The ranks of a job, from its construction, which is collective, until `close`.

    Args:
        cluster: this process.
        answer: called with each request, in a thread of its own; returns the answer.
        name: of the collective.

    Attributes:
        rank: of this process.
        hosts: host names by rank.
        server: answers the requests of other ranks.
    """

    def __init__(self, cluster: Cluster, answer: Callable[[Request], Answer], name: str) -> None:
        self.rank = cluster.rank
        one_host = cluster.local_size == cluster.size

        def handle(request: Request, stream: JsonStream) -> None:
            stream.write(answer(request))

        self.server = PeerServer(handle, "127.0.0.1" if one_host else "", timeout=ANSWER_SECONDS)
        addresses = ("127.0.0.1",) if one_host else host_addresses()
        here = _Peer(socket.gethostname(), addresses, self.server.port, self.server.token)
        self._peers = [here]
        if cluster.size > 1:
            try:
                self._peers = horovod().allgather_object(here, name=name)
            except BaseException:  # in an elastic job other peers follow
                self.server.close()
                raise
        self.hosts = [peer.host for peer in self._peers]

    def __len__(self) -> int:
        """Returns the number of ranks."""
        return len(self._peers)

    def ask(self, rank: int, /, **request: object) -> Answer | None:
        """Returns the answer of a rank; None if there is none."""
        peer = self._peers[rank]
        for address in peer.addresses:
            with (
                suppress(OSError, ValueError),
                send_request(
                    address,
                    peer.port,
                    peer.token,
                    request,
                    connect_timeout=CONNECT_SECONDS,
                    timeout=ANSWER_SECONDS,
                ) as stream,
            ):
                answer: Answer = json.loads(stream.readline(LONGEST_ANSWER))
                return answer
        return None

    def ask_all(self, ranks: Iterable[int], /, **request: object) -> dict[int, Answer | None]:
        """Asks several ranks, CONCURRENT_REQUESTS at a time; returns the answers by rank."""
        ranks = list(ranks)
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
            return dict(zip(ranks, pool.map(lambda rank: self.ask(rank, **request), ranks), strict=True))

    def close(self) -> None:
        """Stops answering."""
        self.server.close()
