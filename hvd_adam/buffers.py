"""A model's buffers across an update that is left out: what one NaN has reached must not stay there for ever."""

from __future__ import annotations

import torch


class BufferGuard:
    """Takes back what a forward pass has done to batch-norm statistics.

    A skipped update leaves weights and moments as they were; but running means have been moved by then, and a NaN
    never leaves them again.

    Args:
        model: whose floating-point buffers to guard.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._live = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._saved = [torch.empty_like(buffer) for buffer in self._live]

    def remember(self) -> None:
        """Notes the buffers as they are; call it before the first forward pass of an update."""
        if self._live:
            torch._foreach_copy_(self._saved, self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Makes them what they were."""
        if self._live:
            torch._foreach_copy_(self._live, self._saved)
