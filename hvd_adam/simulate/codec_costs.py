"""Seconds of encoding, adding and decoding, measured with the functions that a step calls."""

from __future__ import annotations

import torch

from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.gradients.bucket_layout import Layout
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import CODECS, Own
from hvd_adam.distributed.wire.coded_bucket import CodedBucket
from hvd_adam.simulate.machine import Codec
from hvd_adam.simulate.profile import timed

ROWS, COLUMNS = 2048, 1024  # of a bucket of 8 MiB


def codec_costs(cluster: Cluster, repeats: int) -> dict[str, Codec]:
    """Returns the costs of an element by compression, while all ranks compute. Every rank calls it.

    Args:
        cluster: this process.
        repeats: calls of each function.
    """
    ranks, n = cluster.size, ROWS * COLUMNS
    p = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS, device=cluster.device))
    buffer = GradientBuffer([p], Layout.of([p], None, ranks))
    bucket = buffer.layout.buckets[0]
    gradients = buffer.grad[:n]
    gradients.normal_()
    part = -(-n // ranks)
    halves = torch.zeros(ranks * part, dtype=torch.bfloat16, device=cluster.device)
    costs = {
        "fp16": Codec(
            timed(gradients.half, cluster, repeats) / n,
            0.0,
            timed(lambda: gradients.copy_(halves[:n]), cluster, repeats) / n,
        ),
        "bf16": Codec(
            timed(lambda: halves[:n].copy_(gradients), cluster, repeats) / n,
            timed(lambda: halves.view(ranks, -1).float().sum(dim=0).bfloat16(), cluster, repeats) / n,
            timed(lambda: gradients.copy_(halves[:n]), cluster, repeats) / n,
        ),
    }
    for name, codec in CODECS.items():
        costs[name] = _of_codes(
            CodedBucket(codec, buffer, bucket, (), cluster.rank, ranks), buffer, cluster, repeats
        )
    names = list(costs)
    flat = torch.tensor([[costs[x].encode, costs[x].add, costs[x].decode] for x in names], dtype=torch.float64)
    return {name: Codec(*row) for name, row in zip(names, cluster.mean(flat).tolist(), strict=True)}


def _of_codes(coded: CodedBucket, buffer: GradientBuffer, cluster: Cluster, repeats: int) -> Codec:
    """Returns the costs of a format of codes."""
    codec, functions, values = coded.codec, coded.functions, buffer.grad[: coded.elements]
    own = Own(values[: len(coded.server.committed)], 0, 0.5)
    (before, after), (sum_before, sum_after) = coded.worker.advance(), coded.server.advance()
    size = codec.payload_bytes(len(sum_after))
    codes = torch.empty(cluster.size, size, dtype=torch.uint8, device=cluster.device)
    total = torch.empty_like(codes[0])
    calls = [
        lambda: functions.encode(codec, values, before, after, codes, 0.5, 1.0),
        lambda: functions.add_and_encode(codec, codes, own, sum_before, sum_after, total, 1.0),
        lambda: functions.decode(codec, codes, values),
    ]
    return Codec(*(timed(call, cluster, repeats) / coded.elements for call in calls))
