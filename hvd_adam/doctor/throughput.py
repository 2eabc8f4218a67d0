"""Measures how fast a rank computes and how fast Horovod sums over all ranks, on the device of the training."""

from __future__ import annotations

import statistics
import time
from typing import Any

from hvd_adam.distributed.context import Cluster, horovod

TURNS = 3  # of one measurement of the computation
SMALL_SUMS = 20
FIRST_BYTES, MAX_BYTES = 1 << 20, 40 << 20
MAX_SUMS = 20


def compute(cluster: Cluster, seconds: float) -> list[float]:
    """Multiplies float32 matrices on all ranks at once, in `TURNS` turns that start together. Collective.

    Args:
        cluster: this process.
        seconds: approximate duration of all turns together.

    Returns:
        GFLOP/s of this rank in each turn.
    """
    import torch

    size = 4096 if cluster.device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=cluster.device)
    _multiply(matrix)
    return [_compute_turn(cluster, matrix, seconds / TURNS) for _ in range(TURNS)]


def _compute_turn(cluster: Cluster, matrix: Any, seconds: float) -> float:
    import torch

    if cluster.size > 1:
        horovod().allreduce(torch.zeros(1), name="hvd_adam.doctor.compute")
    count, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        _multiply(matrix)
        count += 1
    return count * 2 * len(matrix) ** 3 / elapsed / 1e9


def _multiply(matrix: Any) -> None:
    import torch

    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()


def sums(cluster: Cluster, seconds: float) -> dict[str, float]:
    """Measures all-reduces whose size and number are chosen to fit into `seconds`. Collective.

    Returns:
        Medians: "latency" (seconds of an all-reduce of 4 bytes), "bytes" and "seconds" of a large all-reduce.
    """
    import torch

    small = [_time_sum(torch.zeros(1, device=cluster.device)) for _ in range(SMALL_SUMS)]
    first = torch.zeros(FIRST_BYTES // 4, device=cluster.device)
    _time_sum(first)
    elapsed = _max_over_ranks(_time_sum(first))
    # A third of the time is reserved for the first sum of the final size, which may be slower than the others.
    size = min(MAX_BYTES, max(FIRST_BYTES, int(FIRST_BYTES * seconds / (3 * elapsed))))
    large = torch.zeros(size // 4, device=cluster.device)
    elapsed = _max_over_ranks(_time_sum(large))
    count = max(1, min(MAX_SUMS, int(seconds / (2 * elapsed))))
    times = [_time_sum(large) for _ in range(count)]
    return {
        "latency": statistics.median(small),
        "bytes": float(large.numel() * 4),
        "seconds": statistics.median(times),
    }


def _time_sum(tensor: Any) -> float:
    hvd = horovod()
    begin = time.perf_counter()
    hvd.allreduce_(tensor, op=hvd.Sum, name="hvd_adam.doctor.sum")
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _max_over_ranks(seconds: float) -> float:
    """Returns the longest time of all ranks, so that all ranks choose the same size and number."""
    import torch

    hvd = horovod()
    longest = hvd.allreduce(
        torch.tensor([seconds], dtype=torch.float64), op=hvd.Max, name="hvd_adam.doctor.longest"
    )
    return float(longest.item())
