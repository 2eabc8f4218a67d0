"""`CodedZeroStrategy`: ZeRO stage 1 that sends gradients, and changes of parameters, as codes of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.strategies.allreduce import AllReduceStrategy
from hvd_adam.distributed.strategies.zero import ZeroStrategy
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.masters import Masters


class CodedZeroStrategy(ZeroStrategy):
    """As `ZeroStrategy`. Each rank gets the gradients of its own shard only, with any launcher: as codes.

    While the masters have no codec, it is `ZeroStrategy`.

    Args:
        prefix: as in `AllReduceStrategy`.
        device: of the parameters.
        masters: of the parameters.
    """

    masters: Masters

    def __init__(self, prefix: str, device: torch.device, masters: Masters) -> None:
        super().__init__(prefix, device)
        self.masters = masters

    @property
    def scatters(self) -> bool:
        """Always, as codes."""
        return self.masters.codec is not None or super().scatters

    @property
    def may_scatter(self) -> bool:
        """Always: what a loop does with gradients should not fail after the first change of the compression."""
        return True

    def updating(self) -> AbstractContextManager[None]:
        """Returns a context in which the parameters of this rank's shard are the masters."""
        return super().updating() if self.masters.codec is None else self.masters.updating()

    def exchange_parameters(self, buffers: Sequence[GradientBuffer]) -> None:
        """Sends the codes of what has changed in this rank's shard to the others. Every rank must call it."""
        if self.masters.codec is None:
            super().exchange_parameters(buffers)
            return
        self.masters.exchange()
        for number, buffer in enumerate(buffers):
            if (
                buffer.dtype != torch.float32
            ):  # as many bytes as the codes of int8, or twice as many, and no masters
                self._gather_parameters(buffer, f"{self.prefix}.parameters.{number}")

    def leave_codes(self, buffers: Sequence[GradientBuffer]) -> None:
        """Makes gradients whole, and the masters the parameters, on all ranks. Every rank must call it."""
        self.gather_gradients(buffers)
        self.masters.leave()
        self.exchange_parameters(buffers)


def strategy_of(
    prefix: str, device: torch.device | None, compression: str, may_send_codes: bool
) -> AllReduceStrategy:
    """Returns the strategy of an optimizer.

    Args:
        prefix: as in `AllReduceStrategy`.
        device: of the parameters if the state is sharded, else None.
        compression: the one that is used at first.
        may_send_codes: whether gradients may be sent as codes, now or later.
    """
    if device is None:
        return AllReduceStrategy(prefix)
    if not may_send_codes:
        return ZeroStrategy(prefix, device)
    return CodedZeroStrategy(prefix, device, Masters(CODECS.get(compression), prefix))
