"""The messages and bytes of Horovod's collectives, as hvd_adam uses them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_adam.simulate.machine import Machine


@dataclass(frozen=True)
class Traffic:
    """What a collective moves.

    Attributes:
        messages: that follow each other.
        inside: bytes that a rank sends to ranks of its host.
        between: bytes that a host sends to other hosts.
        sent: bytes that a rank sends, wherever to.
    """

    messages: float
    inside: float
    between: float
    sent: float


@dataclass(frozen=True)
class Ranks:
    """Where the ranks are: `total` of them, `per_host` on each host, neighbours in the ring first."""

    total: int
    per_host: int

    @property
    def several_hosts(self) -> bool:
        """Whether there are several hosts."""
        return self.total > self.per_host


def allreduce(nbytes: float, ranks: Ranks, machine: Machine) -> Traffic:
    """Returns the traffic of a ring: 2(N−1) messages, 2(N−1)/N of the bytes from each rank to the next.

    Of the ring, one edge leaves each host. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms",
    JPDC 69(2), 2009; Baidu's ring, Gloo's and NCCL's. Trees have the same bytes and 2·log₂ of the hosts as
    messages (NCCL 2.4).

    Args:
        nbytes: of each rank's tensor.
        ranks: the ranks.
        machine: whether it uses trees, where they are faster, and how long messages are.
    """
    n = ranks.total
    sent = 2 * (n - 1) / n * nbytes
    messages: float = 2 * (n - 1)
    if machine.trees:
        messages = min(messages, 2 * math.log2(n / ranks.per_host) + 2 * (ranks.per_host - 1))
    pieces = _pieces(nbytes / 2, machine)
    return _around_the_ring(messages * pieces, sent, ranks)


def alltoall(nbytes: float, ranks: Ranks, machine: Machine) -> Traffic:
    """Returns the traffic of an all-to-all: every rank sends an N-th of its bytes to each other rank.

    Args:
        nbytes: of each rank's tensor.
        ranks: the ranks.
        machine: how long messages are.
    """
    n, local = ranks.total, min(ranks.per_host, ranks.total)
    part = nbytes / n
    pieces = _pieces(part, machine)
    return Traffic((n - 1) * pieces, (local - 1) * part, local * (n - local) * part, (n - 1) * part)


def allgather(nbytes: float, ranks: Ranks, machine: Machine) -> Traffic:
    """Returns the traffic of a ring that gathers: N−1 messages, (N−1)/N of the bytes from each rank to the next.

    Source: as for `allreduce`, its second half.

    Args:
        nbytes: of the tensors of all ranks together.
        ranks: the ranks.
        machine: how long messages are.
    """
    n = ranks.total
    sent = (n - 1) / n * nbytes
    pieces = _pieces(nbytes / n, machine)
    return _around_the_ring((n - 1) * pieces, sent, ranks)


def _around_the_ring(messages: float, sent: float, ranks: Ranks) -> Traffic:
    inside = sent if min(ranks.per_host, ranks.total) > 1 else 0.0
    return Traffic(messages, inside, sent if ranks.several_hosts else 0.0, sent)


def _pieces(nbytes: float, machine: Machine) -> int:
    return max(1, math.ceil(nbytes / machine.message_bytes))


def latency(traffic: Traffic, machine: Machine, ranks: Ranks) -> float:
    """Returns the seconds of the messages, which follow each other around the ring.

    Of the links of the ring, one of each host leads to another host (as in NCCL's tuning.cc).
    """
    local = min(ranks.per_host, ranks.total)
    link, inside = machine.between, machine.inside.latency
    each = (link.latency + (local - 1) * inside) / local if ranks.several_hosts else inside
    return traffic.messages * each


def seconds(traffic: Traffic, machine: Machine, ranks: Ranks) -> tuple[float, float]:
    """Returns the seconds of a collective on idle processors, and the core-seconds that each rank spends on it.

    The bytes inside and between hosts travel at the same time.
    """
    link = machine.between if ranks.several_hosts else machine.inside
    wire = max(traffic.inside / machine.inside.bandwidth, traffic.between / machine.between.bandwidth)
    cpu = traffic.sent * link.cpu
    return latency(traffic, machine, ranks) + max(wire, cpu), cpu
