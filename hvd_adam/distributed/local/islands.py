"""`Islands`: which ranks make up an island, and how they exchange."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import broadcast_tensors
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.collectives.groups import RankGroup, all_ranks
from hvd_adam.distributed.context import PROCESS_SETS, horovod
from hvd_adam.errors import UserError

HOST = "host"

# The process sets of a cluster by their ranks: Horovod refuses to add one twice.
_added: tuple[Cluster | None, dict[tuple[int, ...], RankGroup]] = (None, {})


def count_islands(islands: str | int | None, cluster: Cluster) -> int:
    """Returns the number of islands. Nothing is sent; a rank may raise alone.

    Args:
        islands: "host": the ranks of each host are an island; or their number; None: every rank is one.
        cluster: this process.

    Raises:
        UserError: the number is below 1 or does not divide the ranks; hosts have different numbers of ranks, or
            ranks that are not consecutive.
    """
    if islands is None:
        return cluster.size
    if islands == HOST:
        # If it holds on all ranks: the first rank of host h is h times as large as the ranks of each host.
        host, place = divmod(cluster.rank, cluster.local_size)
        if (host, place) != (cluster.cross_rank, cluster.local_rank) or cluster.size % cluster.local_size:
            raise UserError(
                f"islands of hosts need as many ranks on each host, with consecutive numbers: rank {cluster.rank} "
                f"of {cluster.size} is number {cluster.local_rank} of {cluster.local_size} on its host; use "
                "-H host1:4,host2:4 (mpirun: --map-by slot), or give the number of islands"
            )
        return cluster.size // cluster.local_size
    if isinstance(islands, bool) or not isinstance(islands, Integral) or islands < 1:
        raise UserError(f"islands is {islands!r}; it must be {HOST!r}, a whole number ≥ 1, or None")
    if cluster.size % islands:
        raise UserError(f"{islands} islands do not divide {cluster.size} ranks: use a divisor of {cluster.size}")
    return int(islands)


@dataclass(frozen=True)
class Islands:
    """Islands of consecutive ranks, all of the same size. The first rank of each is its leader.

    Attributes:
        count: number of islands.
        size: ranks of each.
        number: the island of this rank.
        own: its ranks.
        leaders: the leaders of all islands.
    """

    count: int
    size: int
    number: int
    own: RankGroup
    leaders: RankGroup

    @classmethod
    def of(cls, count: int, cluster: Cluster) -> Islands:
        """Builds this rank's view of the islands. Every rank must call it.

        Args:
            count: their number, which divides the ranks.
            cluster: this process.

        Raises:
            UserError: on every rank: Horovod was started without process sets.
        """
        size = cluster.size // count
        number = cluster.rank // size
        if size == 1:
            return cls(count, 1, number, RankGroup(None, [cluster.rank]), all_ranks())
        ranks = [range(first, first + size) for first in range(0, cluster.size, size)]
        whole = [all_ranks()] if count == 1 else [_group(members, cluster) for members in ranks]
        one_per_host = size == cluster.local_size and cluster.size == size * cluster.cross_size
        leaders = _group(range(0, cluster.size, size), cluster, on_own_hosts=one_per_host)
        return cls(count, size, number, whole[number], leaders)

    @property
    def is_leader(self) -> bool:
        """Whether this rank exchanges with other islands."""
        return self.leader(self.number) == int(horovod().rank())

    def leader(self, number: int) -> int:
        """Returns the rank that leads an island."""
        return number * self.size

    def spread(self, values: Tensor, name: str) -> None:
        """Gives all ranks of this island its leader's values, in place. Every rank of it must call it."""
        if self.size > 1:
            broadcast_tensors([values], name, self.leader(self.number), self.own)


def _group(ranks: range, cluster: Cluster, *, on_own_hosts: bool = False) -> RankGroup:
    """Returns a group of ranks. Every rank of the job must call it."""
    global _added
    if _added[0] is not cluster:
        _added = cluster, {}
    known = _added[1]
    if tuple(ranks) not in known:
        try:
            process_set = horovod().add_process_set([*ranks])
        except ValueError:
            raise UserError(
                "islands of several ranks need Horovod's process sets: call init(process_sets=True), or set "
                f"{PROCESS_SETS}=1, on all ranks before Horovod starts"
            ) from None
        known[tuple(ranks)] = RankGroup(process_set, ranks, on_own_hosts)
    return known[tuple(ranks)]
