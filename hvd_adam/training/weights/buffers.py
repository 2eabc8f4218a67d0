"""`Buffers`: the buffers that a model has now, also where a module assigns a new tensor in each forward pass."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """The places of a model's buffers, each tensor once.

    Args:
        model: the model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        places = {
            id(buffer): (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._places = list(places.values())

    def now(self) -> list[Tensor]:
        """Returns the buffers, always in the same order.

        Raises:
            KeyError: a module has removed one.
        """
        return [buffer for buffers, name in self._places if (buffer := buffers[name]) is not None]
