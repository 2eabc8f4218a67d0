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


def seconds(call: Callable[[], object], calls: int, finish: Callable[[], None], in_a_row: int = 1) -> list[float]:
    """What each of so many calls takes, until it is finished, after the first few.

    Args:
        call: what is timed.
        calls: how many count.
        finish: waits until a call has done its work.
        in_a_row: calls to one wait; of those their mean. A host that waits for a GPU after each call can neither
            run ahead of it, nor is it seen to be late.
    """
    mean_seconds(call, DROPPED, finish)
    return [mean_seconds(call, in_a_row, finish) for _ in range(calls // in_a_row)]


def mean_seconds(call: Callable[[], object], calls: int, finish: Callable[[], None]) -> float:
    """What one of so many calls takes, from the start of the first until all are finished."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    finish()
    return (time.perf_counter() - start) / calls
