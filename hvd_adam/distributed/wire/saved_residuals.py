"""`SavedResiduals`: the residuals of all ranks as a checkpoint has them, for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.coded_bucket import Place, folded, view
from hvd_adam.errors import UserError

Places = Mapping[str, Place]


def as_saved(
    compression: str,
    ranks: int,
    buckets: Sequence[tuple[Places, Tensor, Tensor]],
    parked: Mapping[str, Tensor],
    masters: Mapping[str, Tensor] | None = None,
    choice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what a checkpoint holds.

    Args:
        compression: the one in use.
        ranks: number of ranks.
        buckets: for each bucket the places of its parameters, and [ranks, n] of both kinds of residuals.
        parked: [ranks, *shape] of parameters that are in no bucket.
        masters: of the parameters, whole; see `Masters`.
        choice: where an automatic choice of the compression stands; None if it is fixed.
    """
    return {
        "compression": compression,
        "ranks": ranks,
        "buckets": [
            {
                "parameters": {name: list(place) for name, place in places.items()},
                "worker": worker,
                "server": server,
            }
            for places, worker, server in buckets
        ],
        "parked": dict(parked),
        "masters": dict(masters or {}),
        "choice": None if choice is None else dict(choice),
    }


class SavedResiduals:
    """Residuals that `as_saved` has returned, or none.

    Args:
        saved: as a checkpoint has them; None for none.

    Attributes:
        ranks: whose residuals they are.
        buckets, parked, masters, choice: as in `as_saved`.

    Raises:
        UserError: they are not what `as_saved` returns.
    """

    def __init__(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            saved = as_saved("int8", 0, [], {})
        try:
            self._compression, self.ranks = saved["compression"], int(saved["ranks"])
            self.buckets = [
                (
                    {name: tuple(place) for name, place in entry["parameters"].items()},
                    entry["worker"],
                    entry["server"],
                )
                for entry in saved["buckets"]
            ]
            self.parked: dict[str, Tensor] = dict(saved["parked"])
            self.masters: dict[str, Tensor] = dict(saved.get("masters", {}))
            self.choice: dict[str, Any] | None = saved.get("choice")
            self._codec = CODECS[self._compression if self.buckets else "int8"]
            self._check_tensors()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _not_residuals(error) from None

    def _check_tensors(self) -> None:
        """Raises a ValueError or TypeError unless all tensors have the rows and the dtype of residuals."""
        for names, *residuals in self.buckets:
            for residual in residuals:
                if residual.dim() != 2 or len(residual) != self.ranks or residual.dtype != torch.float32:
                    raise ValueError(f"of {', '.join(names)}: {_kind(residual)} of {self.ranks} ranks")
        for name, residual in self.parked.items():
            if residual.shape[:1] != (self.ranks,) or residual.dtype != torch.float32:
                raise ValueError(f"of {name}: {_kind(residual)} of {self.ranks} ranks")
        if not all(isinstance(master, Tensor) for master in self.masters.values()):
            raise TypeError("a master is no tensor")

    def fit(self, compression: str, ranks: int, buckets: Sequence[Places], lengths: Sequence[list[int]]) -> bool:
        """Returns whether each rank can continue with its own residuals as they are.

        Args:
            compression: of this run.
            ranks: their number in this run.
            buckets: the places of the parameters in each of its buckets.
            lengths: of both residuals of each bucket, which also tell the strategy.
        """
        saved = [places for places, _, _ in self.buckets]
        saved_lengths = [[worker.shape[1], server.shape[1]] for _, worker, server in self.buckets]
        found = self._compression, self.ranks, saved, saved_lengths
        return found == (compression, ranks, list(buckets), list(lengths))

    def by_name(self, ranks: int) -> dict[str, Tensor]:
        """Returns the residuals of each parameter for a number of ranks, [ranks, *shape].

        With the same number of ranks each keeps its own, with that of its part of the sum. With another number all
        get the same. The sum over the ranks, which is what updates have not received yet, stays the same.

        Raises:
            UserError: a bucket does not have the lengths of its parameters.
        """
        try:
            found = dict(self.parked) | dict(self._of_buckets())
        except (RuntimeError, ValueError, TypeError) as error:  # a bucket is shorter than its parameters
            raise _not_residuals(error) from None
        if ranks == self.ranks:
            return found
        return {
            name: (residual.sum(dim=0, keepdim=True) / ranks).expand(ranks, *residual.shape[1:])
            for name, residual in found.items()
        }

    def _of_buckets(self) -> Iterator[tuple[str, Tensor]]:
        for places, worker, server in self.buckets:
            whole = [folded(self._codec, worker[rank], server[rank], rank) for rank in range(self.ranks)]
            for name, place in places.items():
                yield name, torch.stack([view(flat, place) for flat in whole])


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _not_residuals(error: Exception) -> UserError:
    what = " ".join(str(error).split())[:200]
    return UserError(
        f"these are no residuals of gradients that this version has saved: {type(error).__name__}: {what}"
    )
