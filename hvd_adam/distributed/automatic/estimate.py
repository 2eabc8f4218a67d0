"""What other compressions would gain, without using them: they exchange zeros next to the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Layout
from hvd_adam.distributed.gradients.compression import Reduction, Scaling, start_reduction
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.coded_allreduce import CodedAllReduce
from hvd_adam.distributed.wire.coded_bucket import CodedBucket

REPEATS = 4  # the first is not counted
MOST_ELEMENTS = 1 << 21  # a bucket of float32
_COLUMNS = 512


@torch.no_grad()
def exchange_seconds(
    names: Sequence[str], elements: int, dtype: torch.dtype, device: torch.device, prefix: str
) -> dict[str, float]:
    """Returns how long the exchange of an update's gradients takes with compressions. Every rank must call it.

    Args:
        names: the compressions.
        elements: number of gradients of an update; up to a bucket of them is exchanged, and the time extrapolated.
        dtype: of the gradients.
        device: of the gradients.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no others.

    Returns:
        The median seconds on the slowest rank, by name.
    """
    hvd = horovod()
    exchanged = _COLUMNS * max(1, min(elements, MOST_ELEMENTS) // _COLUMNS)
    p = torch.nn.Parameter(torch.zeros(exchanged // _COLUMNS, _COLUMNS, dtype=dtype, device=device))
    buffer = GradientBuffer([p], Layout.of([p], None, hvd.size()))
    bucket = buffer.layout.buckets[0]
    coded = {
        name: CodedBucket(CODECS[name], buffer, bucket, (), hvd.rank(), hvd.size())
        for name in names
        if name in CODECS
    }

    def start(name: str) -> Reduction:
        scaling = Scaling(1 / hvd.size(), bucket.flags - bucket.start)
        if name in coded:
            return CodedAllReduce(buffer.grad, f"{prefix}.{name}", coded[name], scaling)
        return start_reduction(buffer.grad, f"{prefix}.{name}", name, scaling=scaling)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(REPEATS):
        for name, measured in seconds.items():
            before = time.perf_counter()
            reduction = start(name)
            reduction.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            measured.append(time.perf_counter() - before)
    own = torch.tensor([[median(s[1:]) for s in seconds.values()]], dtype=torch.float64, device="cpu")
    slowest = hvd.allgather(own, name=f"{prefix}.seconds").amax(dim=0)
    return dict(zip(names, (slowest * elements / exchanged).tolist(), strict=True))
