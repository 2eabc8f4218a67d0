"""Restores batch-norm statistics after a skipped update, whose forward pass may have made them NaN."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchNormSnapshot:
    """A copy of a model's floating-point buffers from before an update.

    A skipped update leaves weights and moments unchanged. But the forward pass has already updated the running
    means, and a running mean that became NaN stays NaN.

    Args:
        model: the model; all its floating-point buffers must be on one device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._saved: Tensor | None = None

    def save(self) -> None:
        """Copies the buffers; call it before the first forward pass of an update."""
        if self._buffers:
            self._saved = self._flat_copy()

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
        selected = torch.where(skipped.to(self._saved.device), self._saved, self._flat_copy())
        pieces = torch.split(selected, [buffer.numel() for buffer in self._buffers])
        torch._foreach_copy_(
            self._buffers, [piece.view_as(buffer) for piece, buffer in zip(pieces, self._buffers, strict=True)]
        )

    def _flat_copy(self) -> Tensor:
        """Returns all buffers in one flat tensor of their widest dtype."""
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers])
