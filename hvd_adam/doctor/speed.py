"""How fast a rank computes, and how fast all ranks sum: on the device, and by the way, that a training uses."""

from __future__ import annotations

import statistics
import time
from typing import Any

from hvd_adam.distributed.context import Cluster, horovod

SMALL_SUMS = 20
FIRST_BYTES, MOST_BYTES = 1 << 20, 40 << 20
MOST_SUMS = 20


def compute(cluster: Cluster, seconds: float) -> float:
    """Matrix products of float32 for some seconds, on all ranks at once; GFLOP/s of this rank."""
    import torch

    size = 4096 if cluster.device.type == "cuda" else 512
    matrix = torch.ones(size, size, device=cluster.device)
    _multiply(matrix)
    if cluster.size > 1:
        horovod().allreduce(torch.zeros(1), name="hvd_adam.doctor.compute")
    count, begin = 0, time.perf_counter()
    while (took := time.perf_counter() - begin) < seconds:
        _multiply(matrix)
        count += 1
    return count * 2 * size**3 / took / 1e9


def _multiply(matrix: Any) -> None:
    import torch

    torch.mm(matrix, matrix)
    if matrix.is_cuda:
        torch.cuda.synchronize()


def sums(cluster: Cluster, seconds: float) -> dict[str, float]:
    """Sums over all ranks, as many and as large as fit into some seconds; collective.

    Returns:
        "latency" (seconds of a sum of 4 bytes), "bytes" of a large one and its "seconds", medians.
    """
    import torch

    small = [_sum(torch.zeros(1, device=cluster.device)) for _ in range(SMALL_SUMS)]
    first = torch.zeros(FIRST_BYTES // 4, device=cluster.device)
    _sum(first)
    took = _agreed(_sum(first))
    # A third of the time for the first sum of the final size, which may be slower than it should.
    size = min(MOST_BYTES, max(FIRST_BYTES, int(FIRST_BYTES * seconds / (3 * took))))
    large = torch.zeros(size // 4, device=cluster.device)
    took = _agreed(_sum(large))
    count = max(1, min(MOST_SUMS, int(seconds / (2 * took))))
    times = [_sum(large) for _ in range(count)]
    return {
        "latency": statistics.median(small),
        "bytes": float(large.numel() * 4),
        "seconds": statistics.median(times),
    }


def _sum(tensor: Any) -> float:
    hvd = horovod()
    begin = time.perf_counter()
    hvd.allreduce_(tensor, op=hvd.Sum, name="hvd_adam.doctor.sum")
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _agreed(seconds: float) -> float:
    """The longest of all ranks, so that all decide alike."""
    import torch

    hvd = horovod()
    longest = hvd.allreduce(
        torch.tensor([seconds], dtype=torch.float64), op=hvd.Max, name="hvd_adam.doctor.longest"
    )
    return float(longest.item())
