"""The messages and bytes of Horovod's collectives, as hvd_adam uses them. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_adam.simulate.machine import Machine

_SEGMENT_BYTES = 1 << 20  # as in distributed/openmpi_allreduce.rules
# Of a compressed bucket on processors that is sent in pieces; as in distributed/collectives/pieces.py
PIECE, LEAST_OF_PART = 1 << 20, 1 << 17
_BRUCK_BYTES = 1 << 18  # of a rank; Open MPI 4.1 gathers more than that in another way


@dataclass(frozen=True)
class Traffic:
    """What a collective moves.

    Attributes:
        kind: "allreduce", "alltoall" or "allgather".
        messages: that follow each other.
        inside: bytes that a rank sends to ranks of its host.
        between: bytes that a host sends to other hosts.
        sent: bytes that a rank sends, wherever to.
    """

    kind: str
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
    messages (NCCL 2.4). Open MPI divides what it adds, not what it gathers then, into segments
    (distributed/openmpi_allreduce.rules).

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
    if machine.collectives == "openmpi":
        messages = (n - 1) * (math.ceil(nbytes / pieces / n / _SEGMENT_BYTES) + 1)
    return _around_the_ring("allreduce", messages * pieces, sent, ranks)


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
    return Traffic("alltoall", (n - 1) * pieces, (local - 1) * part, local * (n - local) * part, (n - 1) * part)


def allgather(nbytes: float, ranks: Ranks, machine: Machine) -> Traffic:
    """Returns the traffic of an all-gather: (N−1)/N of the bytes from each rank, by the library's algorithm.

    A ring (Gloo, NCCL; source: as for `allreduce`, its second half) has N−1 messages. Open MPI 4.1 takes other
    algorithms for a few ranks (coll_tuned_decision_fixed.c, allgatherv; 8 KiB of a rank and more):

    - up to 7 ranks below 256 KiB of a rank, and 8 to 15 ranks: Bruck's, in which a rank sends min(2ᵏ, N − 2ᵏ)
      blocks to the one 2ᵏ before it (Bruck et al., "Efficient algorithms for all-to-all communications", TPDS
      8(11), 1997);
    - 4 or 6 ranks from 256 KiB of a rank on: neighbour exchange in N/2 rounds, the later ones of two blocks (Chen
      et al., "Performance evaluation of allgather algorithms on Terascale Linux cluster", HPC Asia 2005). So
      that two blocks are no longer than a message, more than two ranks gather half a message of each
      (distributed/collectives/pieces.py).

    Args:
        nbytes: of the tensors of all ranks together.
        ranks: the ranks.
        machine: whose algorithm, and how long messages are.
    """
    n, local = ranks.total, min(ranks.per_host, ranks.total)
    block = nbytes / n
    sent, pieces = (n - 1) * block, _pieces(block if n == 2 else 2 * block, machine)
    each = block / pieces
    if machine.collectives == "openmpi" and (8 <= n < 16 or (2 < n < 8 and each < _BRUCK_BYTES)):
        distances = [2**k for k in range(math.ceil(math.log2(n)))]
        between = sum(min(local, d) * min(d, n - d) for d in distances) * block
        rounds = len(distances)
    elif machine.collectives == "openmpi" and n in (4, 6):
        # With an even number of ranks on a host, every second round crosses both ends of the host.
        between, rounds = (4 * (n // 4) * block if local % 2 == 0 else sent), n // 2
    else:
        return _around_the_ring("allgather", (n - 1) * pieces, sent, ranks)
    between = between if ranks.several_hosts else 0.0
    return Traffic("allgather", rounds * pieces, sent if local > 1 else 0.0, between, sent)


def _around_the_ring(kind: str, messages: float, sent: float, ranks: Ranks) -> Traffic:
    inside = sent if min(ranks.per_host, ranks.total) > 1 else 0.0
    return Traffic(kind, messages, inside, sent if ranks.several_hosts else 0.0, sent)


def _pieces(nbytes: float, machine: Machine) -> int:
    return max(1, math.ceil(nbytes / machine.message_bytes))


def columns(elements: float, ranks: Ranks, machine: Machine) -> list[float]:
    """Divides a compressed bucket into what is sent at a time, as in distributed/collectives/pieces.py.

    Args:
        elements: of the bucket.
        ranks: the ranks.
        machine: whose devices, unlike processors, send a bucket at a time.

    Returns:
        The elements of each piece, of all ranks' parts together.
    """
    if machine.copies is None:
        return [elements]
    return cut(elements, max(PIECE // ranks.total, LEAST_OF_PART) * ranks.total)


def cut(elements: float, most: float) -> list[float]:
    """Returns the elements of pieces of so many elements, and of the rest, which is the last piece."""
    whole = max(1, math.ceil(elements / most)) - 1
    return [*[float(most)] * whole, elements - whole * most]


def _latency(traffic: Traffic, machine: Machine, ranks: Ranks) -> float:
    """Returns the seconds of the messages, which follow each other around the ring.

    Of the links of the ring, one of each host leads to another host (as in NCCL's tuning.cc).
    """
    local = min(ranks.per_host, ranks.total)
    link, inside = machine.between, machine.inside.latency
    each = (link.latency + (local - 1) * inside) / local if ranks.several_hosts else inside
    return traffic.messages * each


def seconds(traffic: Traffic, machine: Machine, ranks: Ranks) -> tuple[float, float, float]:
    """Returns the seconds of a collective on idle processors, its latency, and the core-seconds of each rank.

    Where devices communicate, the bytes inside and between hosts travel at the same time. Processors copy a
    message before its first byte is sent and after its last one has arrived, and add, so that the bytes of the
    wire take their time in addition. The kernel's work for the wire runs while the wire is busy.
    """
    latency, wire = _latency(traffic, machine, ranks), traffic.between / machine.between.bandwidth
    if machine.copies is None:
        return latency + max(traffic.inside / machine.inside.bandwidth, wire), latency, 0.0
    copies = traffic.sent * machine.copies[traffic.kind]
    kernel = traffic.between / min(ranks.per_host, ranks.total) * machine.between.cpu
    return latency + copies + max(wire, kernel), latency, copies + kernel
