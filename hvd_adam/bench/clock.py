"""Times calls on a rank. Imports no torch on a rank without a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

# At the beginning of a turn caches are cold and threads asleep: so many calls do not count.
DROPPED = 3


def finisher(device: str) -> Callable[[], None]:
    """What waits until the device has done what it was told."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize


def seconds(call: Callable[[], object], calls: int, finish: Callable[[], None]) -> list[float]:
    """What each of so many calls takes, until it is finished, after the first few."""
    return [mean_seconds(call, 1, finish) for _ in range(DROPPED + calls)][DROPPED:]


def mean_seconds(call: Callable[[], object], calls: int, finish: Callable[[], None]) -> float:
    """What one of so many calls takes, from the start of the first until all are finished."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    finish()
    return (time.perf_counter() - start) / calls
