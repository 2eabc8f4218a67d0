"""Times calls on a rank. Imports no torch on a rank without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

# Untimed calls at the start of a turn, while caches are cold and threads are asleep.
WARM_UP_CALLS = 3


def synchronizer(device: str) -> Callable[[], None]:
    """Returns a function that waits until the device, "cpu" or "cuda", has completed all queued work."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def time_calls(
    call: Callable[[], object], calls: int, synchronize: Callable[[], None], calls_per_sync: int = 1
) -> list[float]:
    """Returns the seconds of each call, after `WARM_UP_CALLS` untimed ones.

    Args:
        call: the function to time.
        calls: number of timed calls.
        synchronize: waits until the device has completed a call.
        calls_per_sync: number of calls between two synchronizations; their mean is one value. On a GPU, a
            synchronization after each call would keep the host from queueing work ahead, as it does in training.
    """
    mean_seconds(call, WARM_UP_CALLS, synchronize)
    return [mean_seconds(call, calls_per_sync, synchronize) for _ in range(calls // calls_per_sync)]


def mean_seconds(call: Callable[[], object], calls: int, synchronize: Callable[[], None]) -> float:
    """Returns the mean seconds per call, from the start of the first until the device has completed the last."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls
