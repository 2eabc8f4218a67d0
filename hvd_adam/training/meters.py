"""Exact averages over all ranks, and throughput."""

from __future__ import annotations

import math
import time

import torch

from hvd_adam.distributed.context import Cluster, horovod


def sum_over_ranks(values: torch.Tensor, cluster: Cluster, name: str) -> list[float]:
    """The elementwise sum of a small float64 tensor over the ranks; every rank calls it."""
    if cluster.size > 1:
        values = horovod().allreduce(values, op=horovod().Sum, name=f"hvd_adam.metrics.{name}")
    return values.tolist()


class RunningMean:
    """The mean loss over all samples of all ranks since it was last read, kept on the device until then.

    Micro-batches whose loss is not finite are left out, as their updates are.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._sums = torch.zeros(2, dtype=torch.float64, device=cluster.device)

    def add(self, mean: torch.Tensor, samples: int) -> None:
        """Takes in the mean over a micro-batch of so many samples; neither waits for the device nor for ranks."""
        mean = mean.detach().double()
        finite = mean.isfinite()
        self._sums[0] += torch.where(finite, mean * samples, 0.0)
        self._sums[1] += finite * samples

    def part(self) -> tuple[float, float]:
        """This rank's sum of losses and number of samples since `read`."""
        total, samples = self._sums.tolist()
        return total, samples

    def restore(self, total: float, samples: float) -> None:
        """Goes on from what `part` returned."""
        self._sums.copy_(torch.tensor([total, samples], dtype=torch.float64))

    def read(self) -> float:
        """Returns the mean and starts anew; every rank calls it."""
        total, samples = sum_over_ranks(self._sums, self._cluster, "loss")
        self._sums.zero_()
        return total / samples if samples else math.nan


class ThroughputMeter:
    """Images per second over all ranks; evaluation and other pauses do not count."""

    def __init__(self) -> None:
        self._total_images, self._total_seconds = 0, 0.0
        self._images, self._seconds = 0, 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Starts or goes on."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stops counting until `start`."""
        self._take()
        self._started = None

    def add(self, images: int) -> None:
        """Counts images of all ranks."""
        self._images += images

    def lap(self) -> float:
        """Images per second since the last lap."""
        self._take()
        rate = self._images / max(self._seconds, 1e-9)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._images, self._seconds = 0, 0.0
        return rate

    def total(self) -> float:
        """Images per second over all laps."""
        self.lap()
        return self._total_images / max(self._total_seconds, 1e-9)

    def _take(self) -> None:
        if self._started is not None:
            now = time.perf_counter()
            self._seconds += now - self._started
            self._started = now
