"""`BackgroundGather`: numbers of all ranks, which travel while training continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hvd_adam.distributed.context import horovod


class BackgroundGather:
    """Gathers a row of numbers of each rank in Horovod's thread.

    Every rank must call `start` and `take` in turns, at the same point of its sequence of collectives.

    Args:
        name: of the collective; no other one may have it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._handle: int | None = None

    @property
    def in_flight(self) -> bool:
        """Whether rows have been sent that `take` has not returned."""
        return self._handle is not None

    def start(self, row: Sequence[float]) -> None:
        """Sends the row of this rank, as many numbers as the other ranks send; does not wait."""
        own = torch.tensor([row], dtype=torch.float64, device="cpu")
        self._handle = horovod().allgather_async(own, name=self._name)

    def take(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Returns the rows in the order of the ranks, [ranks, numbers]; waits for them.

        After another collective that every rank has called later, the rows have arrived, or are about to.

        Raises:
            HorovodInternalError: another rank has ended.
        """
        handle, self._handle = self._handle, None
        rows: torch.Tensor = horovod().synchronize(handle)
        return rows.numpy()
