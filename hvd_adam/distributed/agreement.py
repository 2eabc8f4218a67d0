"""Errors and values on which all ranks agree: one rank's failure is raised on every rank."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import CollectiveError, UserError


@contextmanager
def raise_on_all_ranks(cluster: Cluster) -> Iterator[None]:
    """Raises a `UserError` of any rank in this block on every rank.

    For work that can fail on one rank only, such as reading a file that one host lacks. The block must not contain
    a collective, and every rank must enter it. If several ranks fail, all raise the error of the lowest one.

    Args:
        cluster: this process.

    Raises:
        CollectiveError: on every rank; its message names the failed rank and its host, unless that is rank 0.
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
    """Checks that `values` are identical on all ranks. Every rank calls it.

    Args:
        cluster: this process.
        what: a plural noun for the values, used in the message ("arguments").
        values: values by name, of plain types, compared by equality.

    Raises:
        CollectiveError: on every rank, if a value differs from rank 0's; names the first such value, both values,
            and the other rank and its host.
    """
    with raise_on_all_ranks(cluster):
        own = dict(values), socket.gethostname()
        gathered = horovod().allgather_object(own, name="hvd_adam.same") if cluster.size > 1 else [own]
        first = gathered[0][0]
        for rank, (theirs, host) in enumerate(gathered):
            for name in sorted({*theirs, *first}):
                if theirs.get(name) != first.get(name):
                    raise UserError(
                        f"the ranks have different {what}: {name} is {first.get(name)!r} on rank 0 and "
                        f"{theirs.get(name)!r} on rank {rank} on {host}; start all ranks with the same {what}"
                    )
