"""`IslandGradients`: averages gradients over the ranks of an island."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.groups import gather_plain
from hvd_adam.distributed.collectives.pieces import start_allreduce
from hvd_adam.distributed.gradients.lockstep import difference
from hvd_adam.distributed.local.islands import Islands
from hvd_adam.errors import JobError, RankError
from hvd_adam.optim.validation import check_gradient


class IslandGradients:
    """Makes gradients the mean over an island of several ranks, in one all-reduce after the backward pass.

    A small message travels at the same time: which parameters have a gradient, and a checksum of what must be
    identical on all ranks of the island.

    Args:
        islands: the islands.
        parameters: of one dtype and device.
        accumulate: micro-batches per update.
        name: prefix of the names of the collectives, identical on all ranks.
    """

    def __init__(self, islands: Islands, parameters: Sequence[Tensor], accumulate: int, name: str) -> None:
        self._islands, self._parameters, self._name = islands, parameters, name
        self._scale = 1 / (islands.size * accumulate)
        self._flat: Tensor | None = None

    def average(self, facts: Mapping[str, object]) -> None:
        """Makes every gradient the mean over ranks and micro-batches. Every rank of the island must call it.

        A rank without a gradient counts as zero. If no rank has one for a parameter, it stays None.

        Args:
            facts: what must be identical on all ranks of the island, by name, of plain types.

        Raises:
            JobError: on every rank of the island: they differ.
        """
        for p in self._parameters:
            if p.grad is not None:
                check_gradient(p)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._flat = torch.cat([g.reshape(-1) for g in gradients], out=self._flat).mul_(self._scale)
        checksum = zlib.crc32(repr([*facts.items()]).encode())
        halves = [checksum >> 16, checksum & 0xFFFF]
        squares = [half * half for half in halves]
        present = [p.grad is not None for p in self._parameters]
        message = torch.tensor([*halves, *squares, *present], dtype=torch.int64, device="cpu")
        wait_for_gradients = start_allreduce(self._flat, f"{self._name}.gradients", self._islands.own)
        start_allreduce(message, f"{self._name}.message", self._islands.own)()
        wait_for_gradients()
        sums = message.tolist()
        # (Σx)² = n·Σx² only if all n numbers are equal (Cauchy and Schwarz).
        if any(a * a != self._islands.size * b for a, b in zip(sums[:2], sums[2:4], strict=True)):
            gathered = gather_plain(dict(facts), self._islands.own, self._name)
            error = RankError if self._islands.is_leader else JobError  # rank 0 may not fail: the leader prints it
            raise error(difference(gathered, self._islands.own.ranks) or "the ranks have parted")
        pieces = torch.split(self._flat, [p.numel() for p in self._parameters])
        for p, piece, ranks in zip(self._parameters, pieces, sums[4:], strict=True):
            if ranks and p.grad is None:
                p.grad = torch.empty_like(p)
            if ranks and p.grad is not None:
                p.grad.copy_(piece.view_as(p))
