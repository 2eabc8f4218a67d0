"""Measures the figures of docs/adam.md: compiling a kernel, huge pages, and the check for finite gradients.

    python docs/adam_figures.py

11.7 M float32 parameters on the CPU, one thread. Each figure is measured in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ELEMENTS, TENSORS, ROUNDS = 11_700_000, 62, 40
PR_SET_THP_DISABLE = 41  # of prctl(2): no huge pages for this process


def main() -> None:
    """Starts one process per figure."""
    with tempfile.TemporaryDirectory(prefix="hvd_adam-cache-") as cache:
        for name, figure in (
            ("first step, kernel compiled", "first"),
            ("first step, kernel from the cache", "first"),
            ("step with huge pages", "step"),
            ("step without huge pages", "small-pages"),
            ("sum over the gradients, not in cache", "finite"),
        ):
            environ = {**os.environ, "XDG_CACHE_HOME": cache}
            command = [sys.executable, __file__, figure]
            seconds = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
            print(f"{name:<40} {1000 * float(seconds):10.1f} ms", flush=True)


def measure(figure: str) -> float:
    """Returns the seconds of one figure."""
    if figure == "small-pages":
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    import torch

    from hvd_adam import Adam

    torch.set_num_threads(1)
    if figure == "finite":
        gradients, other = torch.randn(ELEMENTS), torch.randn(4 * ELEMENTS)
        return median(lambda: gradients.sum(), before=lambda: other.add_(1))
    parameters = [torch.nn.Parameter(torch.randn(ELEMENTS // TENSORS)) for _ in range(TENSORS)]
    optimizer = Adam(parameters, implementation="fused")
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    start = time.perf_counter()
    optimizer.step()
    first = time.perf_counter() - start
    return first if figure == "first" else median(optimizer.step)


def median(timed: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Returns the median seconds of a call over ROUNDS rounds."""
    times = []
    for _ in range(ROUNDS):
        before()
        start = time.perf_counter()
        timed()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--help"]):
        print(__doc__) if sys.argv[1:] else main()
    else:
        print(measure(sys.argv[1]))
