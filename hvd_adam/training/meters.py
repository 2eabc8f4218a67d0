"""Exact means over all ranks, and throughput."""

from __future__ import annotations

import math
import time

import torch

from hvd_adam.distributed.context import Cluster


class RunningMean:
    """The mean loss over all samples of all ranks since the last `read`, accumulated on the device.

    Micro-batches with a loss that is not finite do not count, because their updates are skipped.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._sums = torch.zeros(2, dtype=torch.float64, device=cluster.device)

    def add(self, mean: torch.Tensor, samples: int) -> None:
        """Adds the mean loss of a micro-batch. Does not wait for the device or for other ranks."""
        mean = mean.detach().double()
        finite = mean.isfinite()
        self._sums[0] += torch.where(finite, mean * samples, 0.0)
        self._sums[1] += finite * samples

    def state(self) -> tuple[float, float]:
        """Returns this rank's sum of losses and number of samples since the last `read`."""
        total, samples = self._sums.tolist()
        return total, samples

    def load_state(self, total: float, samples: float) -> None:
        """Restores what `state` returned."""
        self._sums.copy_(torch.tensor([total, samples], dtype=torch.float64, device="cpu"))

    def read(self) -> float:
        """Returns the mean over all ranks (NaN without samples) and resets it; every rank must call it."""
        total, samples = self._cluster.sum(self._sums).tolist()
        self._sums.zero_()
        return total / samples if samples else math.nan


class ThroughputMeter:
    """Images per second over all ranks. Time between `pause` and `start` does not count."""

    def __init__(self) -> None:
        self._total_images, self._total_seconds = 0, 0.0
        self._images, self._seconds = 0, 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Starts or resumes the clock."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock until `start`."""
        self._update_seconds()
        self._started = None

    def add(self, images: int) -> None:
        """Adds images of all ranks."""
        self._images += images

    def lap(self) -> float:
        """Returns images per second since the last lap, and starts a new lap."""
        self._update_seconds()
        rate = self._images / max(self._seconds, 1e-9)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._images, self._seconds = 0, 0.0
        return rate

    def total(self) -> float:
        """Returns images per second over all laps."""
        self.lap()
        return self._total_images / max(self._total_seconds, 1e-9)

    def _update_seconds(self) -> None:
        if self._started is not None:
            now = time.perf_counter()
            self._seconds += now - self._started
            self._started = now
