"""What the device will know, for the host to read without making it wait before it has to know."""

from __future__ import annotations

import torch


class DeferredFlag:
    """A flag on its way to the host, from construction on.

    Args:
        flag: 0-dimensional, bool; on any device.
    """

    def __init__(self, flag: torch.Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.current_stream(flag.device).record_event()

    def read(self) -> bool:
        """The flag; waits until the device has come to where it was made, and no further."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
