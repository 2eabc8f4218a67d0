"""Rendezvous of an elastic job: the ranks meet before Horovod connects them.

Horovod 0.28.1 connects ranks in a thread that catches no exception (BackgroundThreadLoop in operations.cc). If one
rank is lost meanwhile, all others wait for Gloo's time-out and are then aborted. Ranks therefore check first,
through the launcher's key-value store, that all of them are present. If one has ended, which
hvd_adam/launch/horovodrun.py reports in the store, they ask the launcher for new ranks, as Horovod itself does
after a loss.
"""

from __future__ import annotations

import os
import socket
import time
from http.client import HTTPException

from hvd_adam.distributed.kv_store import KeyValueStore
from hvd_adam.errors import RankError

# Scopes and keys of the store. The launcher clears it whenever it assigns ranks.
SLOTS_SCOPE = "rank_and_size"  # Horovod's: the answer is held until all ranks have asked or ended
MEETING_SCOPE = "hvd_adam_meeting"  # key RANK: that rank is present; MEETING_COMPLETE_KEY: rank 0 has seen all
MEETING_COMPLETE_KEY = "all"
LOSSES_SCOPE = "hvd_adam_gone"  # LOSSES_KEY is set: a rank has ended since ranks were assigned
LOSSES_KEY = "any"

# Set by hvd_adam/launch/horovodrun.py, which reports losses. Under another launcher only a time-out detects them.
REPORTS_LOSSES_VARIABLE = "HVD_ADAM_REPORTS_LOSSES"

# Fields of Horovod's answer under SLOTS_SCOPE, and of its environment.
VARIABLES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
POLL_SECONDS = 0.05
CONNECT_SECONDS = 30.0


def join(*, renew: bool) -> None:
    """Waits for all ranks of the job, and sets Horovod's environment variables to this process's rank.

    Args:
        renew: request a rank from the launcher first, since the earlier ones are no longer valid.

    Raises:
        RankError: this process has no rank in the job any more, or the launcher does not answer.
    """
    try:
        if renew:
            _request_rank()
        while not _meet():
            _request_rank()
    except (OSError, HTTPException) as error:
        raise RankError(
            f"rank {os.environ['HOROVOD_RANK']} on {socket.gethostname()} cannot reach the launcher: {error}"
        ) from None


def _request_rank() -> None:
    """Requests a rank; the launcher answers once all ranks have asked or ended."""
    host, local_rank = os.environ["HOROVOD_HOSTNAME"], os.environ["HOROVOD_LOCAL_RANK"]
    slot = _store().get(SLOTS_SCOPE, f"{host}:{local_rank}")
    values = [] if slot is None else slot.split(",")
    if len(values) != len(VARIABLES) or values[0] == "-1":
        raise RankError(f"{host} has been taken out of the job")
    for name, value in zip(VARIABLES, values, strict=True):
        os.environ[f"HOROVOD_{name}"] = value


def _meet() -> bool:
    """Waits for all ranks. Returns False if one has ended. Rank 0 decides for all."""
    store, rank, size = _store(), int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    deadline = time.monotonic() + _meeting_timeout()
    store.put(MEETING_SCOPE, str(rank), "1")
    missing = [str(other) for other in range(size)] if rank == 0 else [MEETING_COMPLETE_KEY]
    while True:
        missing = [key for key in missing if store.get(MEETING_SCOPE, key) is None]
        if not missing:
            break
        if store.get(LOSSES_SCOPE, LOSSES_KEY) is not None or time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    if rank == 0:
        store.put(MEETING_SCOPE, MEETING_COMPLETE_KEY, "1")
    return True


def _meeting_timeout() -> float:
    """Returns the seconds to wait for missing ranks."""
    if REPORTS_LOSSES_VARIABLE in os.environ:
        return float(os.environ.get("HOROVOD_ELASTIC_TIMEOUT", 600))
    return float(os.environ.get("HOROVOD_GLOO_TIMEOUT_SECONDS", 30))


def _store() -> KeyValueStore:
    return KeyValueStore(
        os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
        int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]),
        connect_timeout=CONNECT_SECONDS,
        answer_timeout=None,
    )
