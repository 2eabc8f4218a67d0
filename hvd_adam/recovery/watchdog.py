"""Ends a job that makes no progress any more, with one report of what every rank does. Never a silent hang.

Horovod's own check does not work under Gloo, and knows nothing of stacks. Here a thread of every rank looks at the
rank's progress, and answers at a socket of its own what the rank does: nothing is sent as long as all is well, and
Horovod is not needed when it is not. A rank without progress tells the lowest rank that answers; that one asks all
and reports. No rank has a part that another could not take: a frozen rank 0 is one that does not answer.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.recovery.stall_report import State, report, stack_of, waits_for

CONNECT_SECONDS = 2.0  # to one address of another rank
ANSWER_SECONDS = 5.0  # of another rank; a frozen one takes the connection and says nothing
SETUP_SECONDS = 600.0  # allowed at least until the second update: data are downloaded, kernels compiled
LONGEST_REPORT = 60.0  # seconds after which a rank that nobody has asked leaves by itself
AT_ONCE = 16  # ranks that are told, and asked, at the same time

_BAD_MESSAGE = (OSError, ValueError, TypeError, KeyError)  # that a stranger, or nobody, has sent


def defer_horovod_stall_shutdown(timeout: float) -> None:
    """Lets Horovod's stall shutdown come after the watchdog, unless the user has set it; call it before `init`."""
    longest = max(timeout, SETUP_SECONDS) + 2 * LONGEST_REPORT
    os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(round(longest)))


@dataclass(frozen=True)
class _Peer:
    host: str
    addresses: tuple[str, ...]
    port: int
    token: str


class Watchdog:
    """Watches this rank from its construction, which is collective, until `close`.

    Progress of any rank is progress of the job. Time in which this process was stopped as a whole (a scheduler's
    suspension) does not count. Each rank listens at a port of its own, on loopback if all are on one host, and
    hears only who knows its token, which it has given to the other ranks.

    Args:
        cluster: this process.
        timeout: seconds without progress after which the job ends with exit code 1, above 0; noticed up to half
            as much, or 10 seconds, later. Until the second `beat` it is SETUP_SECONDS, if that is longer.
    """

    def __init__(self, cluster: Cluster, timeout: float) -> None:
        self._rank, self._timeout, self._interval = cluster.rank, timeout, min(timeout / 4, 5.0)
        self._beats, self._doing = 0, "the set-up"
        self._moved = time.monotonic()  # when progress was last seen
        self._closed = False
        self._looking = threading.Lock()  # held while this rank looks into a stall
        one_host = cluster.local_size == cluster.size
        self._listener = socket.create_server(("127.0.0.1" if one_host else "", 0), backlog=1024)
        self._listener.settimeout(self._interval)
        here = _Peer(
            socket.gethostname(),
            ("127.0.0.1",) if one_host else _addresses(),
            self._listener.getsockname()[1],
            secrets.token_hex(16),
        )
        self._token = here.token
        alone = cluster.size == 1
        self._peers: list[_Peer] = [here] if alone else horovod().allgather_object(here, name="hvd_adam.watchdog")
        _start(self._watch)

    def beat(self, doing: str) -> None:
        """Notes progress: what begins now, for the report; costs no more than it looks."""
        self._doing = doing
        self._beats += 1

    def close(self) -> None:
        """Ends the watch."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread

    # The thread.

    def _watch(self) -> None:
        beats, last = 0, time.monotonic()
        with self._listener:
            while not self._closed:
                try:
                    connection, _ = self._listener.accept()
                    _start(self._serve, connection)
                except TimeoutError:
                    pass
                except OSError:  # too many open files, say: it comes back at once
                    time.sleep(0 if self._closed else self._interval)
                now = time.monotonic()
                if now - last > 2 * self._interval:
                    self._moved += now - last  # this process was stopped, or had no core
                last = now
                if beats != self._beats:
                    beats, self._moved = self._beats, now
                if self._idle() >= self._patience() + LONGEST_REPORT:
                    self._end({self._rank: self._state()})
                elif self._idle() >= self._patience():
                    self._look_into()

    def _idle(self) -> float:
        return time.monotonic() - self._moved

    def _patience(self) -> float:
        return self._timeout if self._beats > 1 else max(self._timeout, SETUP_SECONDS)

    def _state(self) -> State:
        frames = sys._current_frames()
        main = frames[threading.main_thread().ident]
        # On GPUs backward runs in threads of its own; a synchronous collective in it then waits there.
        waiting = next((frame for frame in (main, *frames.values()) if waits_for(frame)), main)
        return {
            "doing": self._doing,
            "beats": self._beats,
            "idle": self._idle(),
            "waits_for": waits_for(waiting),
            "stack": stack_of(waiting),
        }

    # Between ranks: a line of JSON, answered by one.

    def _serve(self, connection: socket.socket) -> None:
        with suppress(*_BAD_MESSAGE), connection, connection.makefile("rw", encoding="utf-8") as stream:
            connection.settimeout(ANSWER_SECONDS)
            request = json.loads(stream.readline(1000))
            if not hmac.compare_digest(str(request["token"]), self._token) or self._closed:
                return
            what, answer = request["what"], {}
            if what == "state":
                answer = self._state()
            elif what == "stalled":
                self._look_into()
            elif what == "moved":
                self._moved = max(self._moved, time.monotonic() - request["idle"])
            elif what == "end":
                os._exit(1)
            stream.write(json.dumps(answer) + "\n")

    def _ask(self, rank: int, **request: object) -> dict[str, Any] | None:
        """The answer of a rank; None if there is none."""
        peer = self._peers[rank]
        for address in peer.addresses:
            with (
                suppress(OSError, ValueError),
                socket.create_connection((address, peer.port), CONNECT_SECONDS) as connection,
                connection.makefile("rw", encoding="utf-8") as stream,
            ):
                connection.settimeout(ANSWER_SECONDS)
                stream.write(json.dumps({"token": peer.token, **request}) + "\n")
                stream.flush()
                return json.loads(stream.readline())
        return None

    def _ask_all(self, ranks: Iterable[int], **request: object) -> dict[int, dict[str, Any] | None]:
        ranks = list(ranks)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(ranks, pool.map(lambda rank: self._ask(rank, **request), ranks), strict=True))

    # A stall.

    def _look_into(self) -> None:
        """Begins to, beside the thread that answers others, unless that is under way."""
        if self._looking.acquire(blocking=False):
            _start(self._tell_or_report)

    def _tell_or_report(self) -> None:
        try:
            for first in range(0, self._rank, AT_ONCE):
                lower = range(first, min(first + AT_ONCE, self._rank))
                if any(answer is not None for answer in self._ask_all(lower, what="stalled").values()):
                    return  # the lowest that answers goes on from here
            self._ask_and_end()
        finally:
            self._looking.release()

    def _ask_and_end(self) -> None:
        """Of the ranks below this one none has answered."""
        states: dict[int, State | None] = dict.fromkeys(range(self._rank))
        states[self._rank] = self._state()
        states |= self._ask_all(range(self._rank + 1, len(self._peers)), what="state")
        idle = min(state["idle"] for state in states.values() if state)
        answering = [rank for rank, state in states.items() if state and rank != self._rank]
        if (
            idle < self._patience() - 2 * self._interval
        ):  # another rank works on, in its share of the test set, say
            self._moved = max(self._moved, time.monotonic() - idle)
            self._ask_all(answering, what="moved", idle=idle)
        elif not self._closed:
            self._end(states, answering)

    def _end(self, states: Mapping[int, State | None], answering: Iterable[int] = ()) -> None:
        late = threading.Timer(LONGEST_REPORT, os._exit, [1])  # if nobody takes what is written
        late.daemon = True
        late.start()
        sys.stderr.write(report(states, [peer.host for peer in self._peers], self._patience()))
        sys.stderr.flush()
        self._ask_all(answering, what="end")
        os._exit(1)


def _start(target: Any, *arguments: object) -> None:
    threading.Thread(target=target, args=arguments, name="hvd_adam.watchdog", daemon=True).start()


def _addresses() -> tuple[str, ...]:
    """This host's IPv4 addresses, without loopback."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    every = [item for name, items in psutil.net_if_addrs().items() if name in up for item in items]
    return tuple(a.address for a in every if a.family == socket.AF_INET and not a.address.startswith("127."))
