"""`SlowRankMonitor`: watches the updates of a training, and reports which rank holds the others up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from hvd_adam.data.protocols import Batch
from hvd_adam.distributed.collectives.background_gather import BackgroundGather
from hvd_adam.distributed.collectives.waiting import seconds_waited
from hvd_adam.distributed.context import Cluster
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.log import logger
from hvd_adam.training.slow_ranks.detector import (
    CHECKPOINT,
    WINDOWS,
    Numbers,
    Slow,
    SlowCheckpoints,
    SlowRankDetector,
    median_update,
)
from hvd_adam.training.slow_ranks.messages import ended_line, slow_line
from hvd_adam.training.slow_ranks.preemption import RunDelays
from hvd_adam.training.slow_ranks.times import UpdateTimes

LEAST_UPDATES = 3  # in a window
LEAST_SECONDS = 0.2  # of a window, so that time slices of the operating system do not decide


class SlowRankMonitor:
    """Sends this rank's times to the others once in a window of updates, and records on rank 0 what they show.

    A window has at least 3 updates and takes at least 0.2 seconds. Its times travel during the next update, so
    no rank waits for them. On one rank this does nothing, nor where ranks do not wait for each other in every
    update (`strategy="local"`): it would make them wait.

    Args:
        cluster: this process.
        optimizer: of the training.
        hosts: host names by rank.
        record: records an event by its name and values; see the documentation of `metrics.jsonl`.
    """

    def __init__(
        self,
        cluster: Cluster,
        optimizer: torch.optim.Optimizer,
        hosts: Sequence[str],
        record: Callable[..., None],
    ) -> None:
        self._cluster, self._hosts, self._record = cluster, hosts, record
        waits = cluster.size > 1 and isinstance(optimizer, DistributedAdam)
        self._optimizer: Any = optimizer if waits else None
        self._times = UpdateTimes(seconds_waited, preempted=RunDelays().since_last_call)
        self._gather = BackgroundGather("hvd_adam.slow_ranks")
        self._detector = SlowRankDetector()
        self._checkpoints = SlowCheckpoints(WINDOWS * LEAST_SECONDS)
        self._length = LEAST_UPDATES
        self._warm, self._compression = False, ""
        self._last_checkpoint = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches of this rank, and counts the time that they take to arrive."""
        return batches if self._optimizer is None else self._times.timed(batches)

    def update_ended(self) -> None:
        """Called after each update, by every rank."""
        if self._optimizer is None:
            return
        self._times.update_ended()
        if self._gather.in_flight:  # since an update, whose gradients came later than these times
            self._read(self._gather.take(), self._optimizer.compression)
        if len(self._times) >= self._length:
            self._gather.start(self._times.take())

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """Measures the block in which rank 0 copies a checkpoint and waits for the one before."""
        start, waited = time.perf_counter(), seconds_waited()
        yield
        end = time.perf_counter()
        held = end - start - (seconds_waited() - waited)
        between, self._last_checkpoint = start - self._last_checkpoint, end
        if self._cluster.is_root and self._optimizer is not None:
            slow, ended = self._checkpoints.add(between, held)
            self._report([slow] if slow else [], [Slow(CHECKPOINT, 0, 0.0, 0.0)] if ended else [])

    def _read(self, times: Numbers, compression: str) -> None:
        """Reads the times of a window of all ranks, the same on every rank."""
        seconds = max(median_update(times), 1e-6)
        self._length = max(LEAST_UPDATES, math.ceil(LEAST_SECONDS / seconds))
        if compression != self._compression:
            self._compression = compression
            self._detector.restart()
        if not self._warm:  # the first window: kernels are compiled, and caches are cold
            self._warm = True
        elif self._cluster.is_root:
            self._report(*self._detector.add(times))

    def _report(self, started: list[Slow], ended: list[Slow]) -> None:
        for slow in ended:
            self._record("slow_rank_end", **self._place(slow))
            logger.info(ended_line(slow, self._hosts))
        for slow in started:
            self._record("slow_rank", **self._place(slow), slowdown=slow.slowdown, seconds=slow.seconds)
            logger.warning(slow_line(slow, self._hosts, self._cluster.device.type))

    def _place(self, slow: Slow) -> dict[str, object]:
        host = None if slow.rank is None else self._hosts[slow.rank]
        return {"cause": slow.cause, "rank": slow.rank, "host": host}
