"""What the cost model needs to know about hosts and networks, and published figures of some. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

UNDIVIDED = 1e18  # bytes of a message: more than any tensor has


@dataclass(frozen=True)
class Link:
    """A connection, in the α-β model: a message of n bytes takes latency + n / bandwidth.

    Source: Hockney, "The communication challenge for MPP", Parallel Computing 20(3), 1994.

    Attributes:
        bandwidth: bytes of payload a second in each direction; of a rank inside a host, of a host between hosts.
        latency: seconds of a message, ≥ 0.
        cpu: core-seconds in which the kernel sends and receives a byte, ≥ 0; 0 where devices do it.
    """

    bandwidth: float
    latency: float
    cpu: float = 0.0


@dataclass(frozen=True)
class Codec:
    """Seconds that one core or device spends on an element of a bucket, measured.

    Attributes:
        encode: from gradients to what is sent, for an element of what is encoded.
        add: the parts of all ranks to what is sent of their sum, for an element of one part.
        decode: from what is received to gradients.
    """

    encode: float = 0.0
    add: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Machine:
    """A cluster of equal hosts.

    Attributes:
        inside: between ranks of a host.
        between: between hosts.
        cycle: seconds between two looks for new tensors, `HOROVOD_CYCLE_TIME`.
        negotiation: seconds until all ranks know that a tensor is ready on all of them.
        update_bandwidth: bytes a second that the optimizer reads and writes.
        copy_bandwidth: bytes a second that a pass over gradients reads and writes.
        copies: core-seconds that a rank spends for a byte that it sends, by kind of collective: copies of
            messages, fresh memory, additions; None where devices communicate.
        collectives: "openmpi", or "ring" for Gloo and NCCL.
        codecs: by compression; others cost what a pass over memory costs.
        jitter: relative standard deviation of a rank's computing time.
        cores: of a host, which computing and communication share; None: communication needs none, as on GPUs.
        threads: that a rank computes with.
        slice: seconds for which Linux lets a thread compute before another one that waits for the core runs.
        trees: whether all-reduces may use double binary trees (Sanders, Speck, Träff 2009; NCCL from 2.4 on).
        message_bytes: of a message between two ranks, at most; collectives on CPUs are divided into such.
        uncertainty: relative standard errors of "computing", "bandwidth", "latency", "jitter".
    """

    inside: Link
    between: Link
    cycle: float = 1e-3
    negotiation: float = 2e-4
    update_bandwidth: float = 1e10
    copy_bandwidth: float = 1e10
    copies: Mapping[str, float] | None = None
    collectives: str = "ring"
    codecs: Mapping[str, Codec] = field(default_factory=dict)
    jitter: float = 0.0
    cores: float | None = None
    threads: int = 1
    slice: float = 0.0
    trees: bool = False
    message_bytes: float = UNDIVIDED
    uncertainty: Mapping[str, float] = field(default_factory=dict)


def expected_maximum(draws: int) -> float:
    """Returns the expected maximum of standard normal draws, by Blom's formula; 0 for one.

    Source: Blom, "Statistical Estimates and Transformed Beta-Variables", 1958: Φ⁻¹((N − 0.375) / (N + 0.25)).
    """
    return NormalDist().inv_cdf((draws - 0.375) / (draws + 0.25)) if draws > 1 else 0.0


# Payload in a full Ethernet packet: 1448 of 1514 bytes (MTU 1500; IPv4, TCP with time stamps, Ethernet).
TCP_PAYLOAD = 1448 / 1514

# Networks by name: bytes/s of a host. Ethernet: the rate times TCP_PAYLOAD, latency of TCP; NDR400: 50 GB/s a NIC
# (NVIDIA ConnectX-7), eight a host (DGX H100), latency of the network in NCCL's tuning.cc (protocol "Simple").
NETWORKS = {
    "10gbe": Link(1.25e9 * TCP_PAYLOAD, 30e-6),
    "25gbe": Link(3.125e9 * TCP_PAYLOAD, 30e-6),
    "100gbe": Link(12.5e9 * TCP_PAYLOAD, 30e-6),
    "ndr400": Link(400e9, 14e-6),
}

# Figures of data sheets, nothing measured: hence the uncertainties.
_PUBLISHED = {"computing": 0.1, "bandwidth": 0.2, "latency": 0.5, "jitter": 0.5}


@dataclass(frozen=True)
class Preset:
    """Known hardware.

    Attributes:
        machine: its costs.
        ranks_per_host: GPUs of a host.
        source: where the figures are from.
    """

    machine: Machine
    ranks_per_host: int
    source: str


PRESETS = {
    "p100-roce25": Preset(
        Machine(
            inside=Link(12e9, 5.7e-6),
            between=Link(3.125e9 * TCP_PAYLOAD, 14e-6),
            cycle=5e-3,
            negotiation=1e-3,
            update_bandwidth=0.8 * 732e9,
            copy_bandwidth=0.8 * 732e9,
            jitter=0.03,
            uncertainty=_PUBLISHED,
        ),
        4,
        "4 P100 a host, 25 Gbit/s RoCE (arXiv 1802.05799); PCIe 3.0 ×16 at 12 of 15.8 GB/s, 732 GB/s memory (data "
        "sheet, 80 % reached), latencies of NCCL's tuning.cc, rings only (NCCL before 2.4), Horovod's cycle of "
        "5 ms; the jitter of 3 % is an assumption",
    ),
    "h100-ndr400": Preset(
        Machine(
            inside=Link(0.88 * 450e9, 3.4e-6),
            between=Link(0.88 * 400e9, 14e-6),
            negotiation=2e-4,
            update_bandwidth=0.8 * 3.35e12,
            copy_bandwidth=0.8 * 3.35e12,
            jitter=0.02,
            trees=True,
            uncertainty=_PUBLISHED,
        ),
        8,
        "8 H100 SXM a host, NVLink 4 (450 GB/s one way, 88 % reached as between two H200), 8 × NDR400, 3.35 TB/s "
        "memory (data sheet, 80 % reached), latencies of NCCL's tuning.cc; the jitter of 2 % is an assumption",
    ),
}
