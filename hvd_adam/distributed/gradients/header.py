"""`Header`: what all ranks know of a round of reductions before its last bucket has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import start_allreduce

# Largest 2-norm of what one rank has in a bucket with which no sum over the ranks, and no code of it, can
# overflow: far below the largest float32, 3.4e38. Its square is a float32, too.
_LARGEST_NORM = 1e18
_LARGEST_FP16_SUM = 3e4  # half of the largest float16


def square_of(gradients: Tensor) -> Tensor:
    """Returns the squared 2-norm of a 1-dimensional tensor on the CPU, which is read once, at memory bandwidth."""
    values = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
    return torch.dot(values, values)


def sums_are_finite(square: Tensor, compression: str, ranks: int, dtype: torch.dtype = torch.float32) -> bool:
    """Returns whether the sums over the ranks are finite if every rank's gradients are as small as this one's.

    No element is larger than the 2-norm. Larger gradients, which may have a finite sum, return False too.

    Args:
        square: squared 2-norm of this rank's gradients.
        compression: as in `start_reduction`.
        ranks: number of ranks.
        dtype: of the gradients. The rounding of a compression makes some larger, and float16's range is small.
    """
    if compression == "fp16":
        largest = _LARGEST_FP16_SUM / ranks
    else:
        largest = _LARGEST_FP16_SUM if dtype == torch.float16 and compression != "none" else _LARGEST_NORM
    return bool(square < largest**2)


class Header:
    """A small all-reduce ahead of the last bucket of a round, started by its constructor.

    A rank sends it when its backward pass has ended, so it knows all of its gradients. With its sum, buckets can
    be used as they arrive: nothing that comes later can change the decision to make the update.

    Args:
        name: of the collective.
        message: as in `Reducer.send_rest`.
        present: for each parameter of each bucket whether this rank has a gradient.
        sums_are_finite: see the function; of all buckets of this rank.

    Attributes, once `wait` has returned:
        message: the sum of the messages of all ranks.
        used: for each parameter of each bucket whether a rank has a gradient.
        sums_are_finite: whether all sums over the ranks are known to be finite.
    """

    def __init__(
        self, name: str, message: Tensor, present: Sequence[Sequence[bool]], *, sums_are_finite: bool
    ) -> None:
        self._lengths = [len(message), 1, *map(len, present)]
        flags = torch.tensor([not sums_are_finite, *chain(*present)], dtype=torch.float32, device="cpu")
        self._values = torch.cat([message, flags])
        self._finish = start_allreduce(self._values, name)
        self._arrived = False

    def wait(self) -> None:
        """Waits for all ranks."""
        if self._arrived:
            return
        self._finish()
        self._arrived = True
        message, unsafe, *used = torch.split(self._values, self._lengths)
        self.message: list[float] = message.tolist()
        self.sums_are_finite = not unsafe.any()
        self.used: list[list[bool]] = [(ranks > 0).tolist() for ranks in used]
