"""Restores batch-norm statistics after a skipped update, whose forward pass may have made them NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.training.weights.buffers import Buffers


class BatchNormSnapshot:
    """A copy of a model's floating-point buffers from before an update.

    A skipped update leaves weights and moments unchanged. But the forward pass has already updated the running
    means, and a running mean that became NaN stays NaN.

    Args:
        model: the model; all its floating-point buffers must be on one device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._buffers = Buffers(model)
        self._saved: Tensor | None = None

    def save(self) -> None:
        """Copies the buffers; call it before the first forward pass of an update."""
        if buffers := self._floating():
            self._saved = _flat_copy(buffers)

    @torch.no_grad()
    def restore(self, skipped: Tensor | None) -> None:
        """Restores the buffers if the update was skipped, without a device synchronization.

        Args:
            skipped: `DistributedAdam.skipped`.
        """
        if skipped is None or self._saved is None or (skipped.is_cpu and not skipped):
            return
        # The device selects, for all buffers at once: one launch per buffer takes longer than the forward pass of
        # a small model.
        buffers = self._floating()
        selected = torch.where(skipped.to(self._saved.device), self._saved, _flat_copy(buffers))
        pieces = torch.split(selected, [buffer.numel() for buffer in buffers])
        views = [piece.view_as(buffer) for piece, buffer in zip(pieces, buffers, strict=True)]
        torch._foreach_copy_([buffer.detach() for buffer in buffers], views)

    def _floating(self) -> list[Tensor]:
        return [buffer for buffer in self._buffers.now() if buffer.is_floating_point()]


def _flat_copy(buffers: list[Tensor]) -> Tensor:
    """Returns all buffers in one flat tensor of their widest dtype."""
    return torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
