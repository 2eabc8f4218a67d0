"""Errors and values on which all ranks agree: one rank's failure is raised on every rank."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import CollectiveError, UserError


@contextmanager
def raise_on_all_ranks(cluster: Cluster) -> Iterator[None]:
    """Ends the block on every rank if it failed on one: all raise the first failing rank's `UserError`.

    For work that each rank does by itself and that can fail on one alone (a missing file on one host). The
    block must hold no collective, and every rank must reach its end.

    Raises:
        CollectiveError: on every rank, naming the rank and host if it was not rank 0.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = f"rank {cluster.rank} on {socket.gethostname()}: {error}" if cluster.rank else str(error)
    failures = (
        horovod().allgather_object(failure, name="hvd_adam.raise_on_all_ranks") if cluster.size > 1 else [failure]
    )
    for first in filter(None, failures):
        raise CollectiveError(first)


def require_same(cluster: Cluster, what: str, values: Mapping[str, object]) -> None:
    """Raises CollectiveError on every rank, naming the first of `values` that differs from rank 0's.

    Args:
        cluster: this process.
        what: what the values are, for the message ("arguments").
        values: by name; compared by equality, so of plain types.
    """
    with raise_on_all_ranks(cluster):
        own = dict(values), socket.gethostname()
        everyones = horovod().allgather_object(own, name="hvd_adam.same") if cluster.size > 1 else [own]
        first = everyones[0][0]
        for rank, (theirs, host) in enumerate(everyones):
            for name in sorted({*theirs, *first}):
                if theirs.get(name) != first.get(name):
                    raise UserError(
                        f"the ranks have different {what}: {name} is {first.get(name)!r} on rank 0 and "
                        f"{theirs.get(name)!r} on rank {rank} on {host}; start all ranks alike"
                    )
