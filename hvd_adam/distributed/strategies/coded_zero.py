"""`CodedZeroStrategy`: ZeRO stage 1 that sends gradients, and changes of parameters, as codes of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.strategies.allreduce import AllReduceStrategy
from hvd_adam.distributed.strategies.zero import ZeroStrategy
from hvd_adam.distributed.wire.masters import Masters


class CodedZeroStrategy(ZeroStrategy):
    """As `ZeroStrategy`. Each rank gets the gradients of its own shard only, with any launcher: as codes.

    Args:
        prefix: as in `AllReduceStrategy`.
        device: of the parameters.
        masters: of the parameters.
    """

    def __init__(self, prefix: str, device: torch.device, masters: Masters) -> None:
        super().__init__(prefix, device)
        self._masters = masters

    @property
    def scatters(self) -> bool:
        """Always."""
        return True

    def updating(self) -> AbstractContextManager[None]:
        """Returns a context in which the parameters of this rank's shard are the masters."""
        return self._masters.updating()

    def exchange_parameters(self, buffers: Sequence[GradientBuffer]) -> None:
        """Sends the codes of what has changed in this rank's shard to the others. Every rank must call it."""
        self._masters.exchange()
        for number, buffer in enumerate(buffers):
            if (
                buffer.dtype != torch.float32
            ):  # as many bytes as the codes of int8, or twice as many, and no masters
                self._gather_parameters(buffer, f"{self.prefix}.parameters.{number}")


def strategy_of(prefix: str, device: torch.device | None, masters: Masters | None) -> AllReduceStrategy:
    """Returns the strategy of an optimizer.

    Args:
        prefix: as in `AllReduceStrategy`.
        device: of the parameters if the state is sharded, else None.
        masters: of a sharded state whose gradients are sent as codes, else None.
    """
    if device is None:
        return AllReduceStrategy(prefix)
    return ZeroStrategy(prefix, device) if masters is None else CodedZeroStrategy(prefix, device, masters)
