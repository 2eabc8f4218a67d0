"""A model's buffers across an update that is left out: what one NaN has reached must not stay there for ever."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchNormSnapshot:
    """Takes back what a forward pass has done to batch-norm statistics.

    A skipped update leaves weights and moments as they were; but running means have been moved by then, and a NaN
    never leaves them again.

    Args:
        model: whose floating-point buffers to guard; they are on one device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._live = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._saved: Tensor | None = None

    def remember(self) -> None:
        """Notes the buffers as they are; call it before the first forward pass of an update."""
        if self._live:
            self._saved = self._all()

    @torch.no_grad()
    def restore(self, skipped: Tensor | None) -> None:
        """Makes them what they were, if the update has been skipped; does not wait for a GPU to know it.

        Args:
            skipped: `DistributedAdam.skipped`.
        """
        if skipped is None or not self._live or (skipped.is_cpu and not skipped):
            return
        # Chosen by the device, all in one: a launch for each buffer would take longer than a small model's pass.
        chosen = torch.where(skipped.to(self._saved.device), self._saved, self._all())
        pieces = chosen.split([buffer.numel() for buffer in self._live])
        torch._foreach_copy_(
            self._live, [piece.view_as(buffer) for piece, buffer in zip(pieces, self._live, strict=True)]
        )

    def _all(self) -> Tensor:
        """A copy of all of them in one tensor, of the widest of their dtypes."""
        return torch.cat([buffer.reshape(-1) for buffer in self._live])
