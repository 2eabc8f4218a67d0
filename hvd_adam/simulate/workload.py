"""What a model computes in a step, and when its gradients are ready. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together.

    Attributes:
        elements: number of gradients.
        exact: those of them that codes leave out and that are sent as float32.
        ready: seconds from the start of backward until the last of them is computed.
    """

    elements: int
    exact: int
    ready: float


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one rank.

    Attributes:
        samples: in it.
        forward: seconds of the forward pass and the loss.
        backward: seconds of the backward pass.
        buckets: in the order in which they are ready; the last one is sent at the end of backward.
        unexplained: seconds of a measured step by "strategy-compression" that the model did not explain, where
            ranks have a core each; may be negative.
        sharing: factor of all times where ranks share cores, beyond their number: they share caches.
    """

    samples: int
    forward: float
    backward: float
    buckets: tuple[Bucket, ...]
    unexplained: Mapping[str, float] = field(default_factory=dict)
    sharing: float = 1.0

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(bucket.elements for bucket in self.buckets)

    def slower(self, factor: float, *, samples: float = 1.0) -> Workload:
        """Returns it with other times and another number of samples.

        Args:
            factor: of all times.
            samples: factor of the number of samples.
        """
        buckets = tuple(replace(bucket, ready=bucket.ready * factor) for bucket in self.buckets)
        size = round(self.samples * samples)
        forward, whole = self.forward * factor, self.backward * factor
        return replace(self, samples=size, forward=forward, backward=whole, buckets=buckets)


@dataclass(frozen=True)
class Published:
    """A model by the figures of its paper.

    Attributes:
        stages: from the last layers to the first: parameters, and their share of the time of backward.
        throughput: samples a second of one P100, float32, batch 64.
        source: of the throughput.
    """

    stages: Sequence[tuple[float, float]]
    throughput: float
    source: str


# Shares of backward: estimated from the layers (arXiv 1512.03385, 1512.00567, 1409.1556), not measured.
PUBLISHED = {
    "resnet101": Published(
        ((2.0e6, 0.01), (15.0e6, 0.10), (26.1e6, 0.69), (1.2e6, 0.13), (0.2e6, 0.07)),
        1656.82 / 16,
        "a 16th of the 1656.82 images/s of 16 GPUs in Horovod's documentation of its benchmarks",
    ),
    "inception3": Published(
        ((2.0e6, 0.01), (11.1e6, 0.15), (8.9e6, 0.50), (1.5e6, 0.20), (0.3e6, 0.14)),
        142.0,
        "TensorFlow's benchmarks of a DGX-1 with one P100",
    ),
    "vgg16": Published(
        (
            (4.1e6, 0.01),
            (16.8e6, 0.01),
            (102.8e6, 0.03),
            (7.1e6, 0.10),
            (5.9e6, 0.32),
            (1.5e6, 0.28),
            (0.3e6, 0.25),
        ),
        154.0,
        "TensorFlow's benchmarks of a DGX-1 with one P100",
    ),
}

FORWARD_SHARE = 1 / 3  # of a step's computing: backward does the products of forward twice


def published(name: str, batch: int, throughput: float, bucket_bytes: int) -> Workload:
    """Returns the workload of a published model.

    Args:
        name: in `PUBLISHED`.
        batch: samples of a rank.
        throughput: samples a second of one rank that trains alone.
        bucket_bytes: size of a bucket.
    """
    seconds = batch / throughput
    backward = (1 - FORWARD_SHARE) * seconds
    limit, buckets, filled, passed = bucket_bytes // 4, [], 0.0, 0.0
    for parameters, share in PUBLISHED[name].stages:
        pieces = max(1, round(parameters / limit))
        for _ in range(pieces):
            filled, passed = filled + parameters / pieces, passed + share / pieces
            if filled >= 0.75 * limit:
                buckets.append(Bucket(round(filled), 0, passed * backward))
                filled = 0.0
    if filled:
        buckets.append(Bucket(round(filled), 0, backward))
    return Workload(batch, FORWARD_SHARE * seconds, backward, tuple(buckets))
