"""`OuterBuffers`: the buffers of a model, such as statistics of batch normalization, at the last meeting."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import broadcast_tensors
from hvd_adam.distributed.collectives.pieces import start_allreduce
from hvd_adam.distributed.local.islands import Islands


class OuterBuffers:
    """Buffers that each island changes by itself, and all islands average when they meet.

    Those of an island are its leader's, as averaged gradients keep rank 0's.

    Args:
        model: the model.
        islands: the islands.
        name: prefix of the names of the collectives, identical on all ranks.
    """

    def __init__(self, model: torch.nn.Module, islands: Islands, name: str) -> None:
        self._model, self._islands, self._name = model, islands, name
        self.values = self.local()

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The buffers by name, those of today: a model may replace them."""
        return dict(self._model.named_buffers())

    def local(self) -> dict[str, Tensor]:
        """Returns copies of this island's own buffers, by name."""
        return {name: buffer.detach().clone() for name, buffer in self._buffers.items()}

    def average(self) -> None:
        """Replaces real buffers by their mean over the islands, and others by rank 0's. Every rank must call it.

        An element whose mean is NaN keeps the value of the last meeting. The mean is computed in float64, so that
        a buffer that is constant keeps its bits.
        """
        buffers = self._buffers
        real = {name: buffer for name, buffer in buffers.items() if buffer.is_floating_point()}
        if real:
            flat = torch.cat([buffer.detach().reshape(-1).double() for buffer in real.values()])
            if self._islands.is_leader:
                start_allreduce(flat, f"{self._name}.buffers", self._islands.leaders)()
                flat /= self._islands.count
            self._islands.spread(flat, f"{self._name}.mean_buffers")
            pieces = torch.split(flat, [buffer.numel() for buffer in real.values()])
            for (name, buffer), piece in zip(real.items(), pieces, strict=True):
                mean = piece.view_as(buffer).to(buffer.dtype)
                before = self.values.get(name, buffer)
                buffer.copy_(torch.where(mean.isnan(), before.to(buffer.dtype), mean))
        others = [buffer for name, buffer in buffers.items() if name not in real]
        broadcast_tensors(others, f"{self._name}.others")
        self.values = self.local()

    def write(self, values: dict[str, Tensor] | None = None) -> None:
        """Gives the model the buffers of the last meeting, or other ones, by name."""
        buffers = self._buffers
        for name, value in (self.values if values is None else values).items():
            if name in buffers:
                buffers[name].copy_(value)
