"""Rank and world size for samplers and shards: those of the running job, or given."""

from hvd_adam.distributed.context import running_cluster
from hvd_adam.errors import UserError


def rank_and_size(rank: int | None, size: int | None) -> tuple[int, int]:
    """Returns the given rank and size; without them those of the running job, or (0, 1) in a single process.

    Raises:
        UserError: only one of the two is given, or the rank is not below the size; neither is given, and a
            launcher started several ranks, but `init` has not been called.
    """
    if rank is None and size is None:
        cluster = running_cluster()
        return (0, 1) if cluster is None else (cluster.rank, cluster.size)
    if rank is None or size is None:
        raise UserError(f"rank is {rank} and size is {size}: give both, or neither after init()")
    if not 0 <= rank < size:
        raise UserError(f"rank is {rank} and size is {size}: a rank is at least 0 and below the size")
    return rank, size
