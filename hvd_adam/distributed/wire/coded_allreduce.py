"""`CodedAllReduce`, `CodedReduceScatter`: the mean of a bucket over the ranks, sent as codes of few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import start_allgather, start_alltoall
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.compression import AllReduce, Scaling
from hvd_adam.distributed.wire.coded_bucket import CodedBucket


class CodedAllReduce:
    """The sum over the ranks in two phases, each with a residual of its own.

    Every rank sends the codes of the r-th part of its bucket to rank r, which adds the parts in rank order in
    float32 and sends the codes of the sum to all ranks: about 2·(N−1)/N·n·bits/8 bytes per rank. All ranks decode
    the same codes, so they get the same bits.

    Args:
        gradients: the bucket, with flags and message; float32, float16 or bfloat16.
        name: as in `start_reduction`.
        coded: residuals and memory of the bucket.
        scaling: a factor for the gradients.
    """

    def __init__(self, gradients: Tensor, name: str, coded: CodedBucket, scaling: Scaling) -> None:
        self._coded, self._name = coded, name
        self._gradients = gradients[: coded.elements]
        self._exact_views = [gradients[start:end] for start, end in coded.exact_spans]
        exact = torch.cat(self._exact_views).float()
        factor = Scaling(scaling.factor, len(exact) - len(self._exact_views[-1]))
        self._clear_gaps()
        before, after = coded.worker.advance()
        coded.functions.encode(
            coded.codec, self._gradients, before, after, coded.parts, scaling.factor, coded.unit
        )
        self._received = start_alltoall(coded.parts, f"{name}.parts")
        self._exact = exact
        self._exact_sum = AllReduce(exact, exact_name(name), "none", scaling=factor)

    def _clear_gaps(self) -> None:
        for start, end in self._coded.zero_spans:
            self._gradients[start:end].zero_()

    def start_gather(self) -> None:
        """Waits for the parts of all ranks, adds them, and starts to send the codes of the sum."""
        coded = self._coded
        payloads, (before, after) = self._received(), coded.server.advance()
        coded.functions.add_and_encode(coded.codec, payloads, before, after, coded.total, coded.unit)
        self._gathered = start_allgather(coded.total, f"{self._name}.sum")

    def wait(self) -> None:
        """Waits for the sum."""
        coded = self._coded
        coded.functions.decode(coded.codec, self._gathered(), self._gradients)
        self._wait_for_exact()

    def _wait_for_exact(self) -> None:
        self._exact_sum.wait()
        sums = torch.split(self._exact, list(map(len, self._exact_views)))
        torch._foreach_copy_(self._exact_views, list(sums))


class CodedReduceScatter(CodedAllReduce):
    """The first phase alone: each rank gets the sum of its own shard, and all ranks what is sent exactly."""

    def start_gather(self) -> None:
        """Does nothing: there is no second phase."""

    def wait(self) -> None:
        """Waits for the sum of the own shard."""
        coded = self._coded
        ranks = len(coded.parts)
        parts = torch.empty(coded.elements, dtype=torch.float32, device=self._gradients.device)
        coded.functions.decode(coded.codec, self._received(), parts)
        total, *others = parts.view(ranks, -1)
        for part in others:  # in rank order
            total += part
        self._gradients.view(ranks, -1)[horovod().rank()].copy_(total)
        self._clear_gaps()  # the norm of a shard is that of neighbouring parameters in one piece
        self._wait_for_exact()


def exact_name(name: str) -> str:
    """Returns the name of the all-reduce of what is sent exactly."""
    return f"{name}.exact"
