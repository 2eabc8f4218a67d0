"""`one_by_one`: outputs that depend on a sample only, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def one_by_one(forward: Callable[[torch.Tensor], Any], inputs: torch.Tensor, *, parallel: bool) -> Any:
    """Returns the outputs of a model in evaluation mode for samples, each computed as a batch of its own.

    Kernels add in another order for another size of the batch, place in it, alignment of its memory or number of
    threads. So each sample is copied to memory of its own, and passes the model alone and on one thread.

    Args:
        forward: maps samples to outputs; on a CPU it runs in other threads than the caller's.
        inputs: shape `(samples, …)`, at least one.
        parallel: whether as many threads as torch has may call `forward` at a time.

    Returns:
        The outputs, of shape `(samples, …)`; where `forward` returns no tensor, what it returns for all inputs.
    """

    def alone(sample: torch.Tensor) -> Any:
        rows = torch.empty(1, *sample.shape, dtype=sample.dtype, device=sample.device)
        with torch.inference_mode():
            return forward(rows.copy_(sample))

    threads = torch.get_num_threads()
    workers = threads if parallel else 1
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            outputs = list(pool.map(alone, inputs))
    finally:
        torch.set_num_threads(threads)  # which threads that start later would otherwise take over from the pool's
    return torch.cat(outputs) if isinstance(outputs[0], torch.Tensor) else forward(inputs)
