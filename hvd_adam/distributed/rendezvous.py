"""Where the ranks of an elastic job meet before Horovod connects them.

Horovod 0.28.1 connects ranks in a thread that catches nothing (BackgroundThreadLoop in operations.cc). If one is
lost meanwhile, the others wait for Gloo's time-out, and are then aborted, all of them. So ranks make sure first,
through the launcher's key-value store, that all are there. If one has ended (launch/horovodrun.py says so in the
store) they ask the launcher for their places anew, as Horovod itself does after a loss.
"""

from __future__ import annotations

import os
import socket
import time
from http.client import HTTPConnection, HTTPException

from hvd_adam.errors import RankError

# Scopes of the store; the launcher empties it whenever it gives out places.
PLACES = "rank_and_size"  # Horovod's: answers once all ranks have asked, or ended
MEETING = "hvd_adam_meeting"  # RANK: that rank is there; ALL: rank 0 has seen all
LOSSES_SCOPE = "hvd_adam_gone"  # LOSSES_KEY: a rank has ended since
ALL = "all"
LOSSES_KEY = "any"

# Set by launch/horovodrun.py: it says who has ended. Under another launcher only time tells.
REPORTS_LOSSES_VARIABLE = "HVD_ADAM_TOLD_OF_LOSSES"

VARIABLES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
POLL_SECONDS = 0.05
CONNECT_SECONDS = 30.0
# Until a launcher that does not answer counts as lost.
IDLE_SECONDS, PROBE_SECONDS, PROBES = 10, 5, 3


def join(*, anew: bool) -> None:
    """Returns once all ranks of the job are there, with this rank's place in Horovod's variables.

    Args:
        anew: ask for a place, since those of before no longer hold.

    Raises:
        RankError: this rank has no place any more, or the launcher does not answer.
    """
    try:
        if anew:
            _ask()
        while not _meet():
            _ask()
    except (OSError, HTTPException) as error:
        raise RankError(
            f"rank {os.environ['HOROVOD_RANK']} on {socket.gethostname()} cannot reach the launcher: {error}"
        ) from None


def _ask() -> None:
    """Asks for this rank's place; the launcher answers once all ranks have asked, or ended."""
    host, local_rank = os.environ["HOROVOD_HOSTNAME"], os.environ["HOROVOD_LOCAL_RANK"]
    place = _get(PLACES, f"{host}:{local_rank}")
    values = [] if place is None else place.split(",")
    if len(values) != len(VARIABLES) or values[0] == "-1":
        raise RankError(f"{host} has been taken out of the job")
    for name, value in zip(VARIABLES, values, strict=True):
        os.environ[f"HOROVOD_{name}"] = value


def _meet() -> bool:
    """Waits for all ranks; False if one of them has ended. Rank 0 decides for all."""
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    deadline = time.monotonic() + _patience()
    _put(MEETING, str(rank))
    missing = [str(other) for other in range(size)] if rank == 0 else [ALL]
    while True:
        missing = [key for key in missing if _get(MEETING, key) is None]
        if not missing:
            break
        if _get(LOSSES_SCOPE, LOSSES_KEY) is not None or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    if rank == 0:
        _put(MEETING, ALL)
    return True


def _patience() -> float:
    """Seconds to wait for ranks that say nothing."""
    if REPORTS_LOSSES_VARIABLE in os.environ:
        return float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", 600))
    return float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 30))


def _get(scope: str, key: str) -> str | None:
    return _request("GET", scope, key)


def _put(scope: str, key: str) -> None:
    _request("PUT", scope, key, "1")


def _request(method: str, scope: str, key: str, value: str | None = None) -> str | None:
    """A value of the store, None where there is none."""
    address = os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    connection = HTTPConnection(*address, timeout=CONNECT_SECONDS)
    try:
        connection.connect()
        _keep_alive(connection.sock)  # the answer may take long; from a host that is cut off there is none
        connection.request(method, f"/{scope}/{key}", value)
        answer = connection.getresponse()
        return answer.read().decode("ascii") if answer.status == 200 else None
    finally:
        connection.close()


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
