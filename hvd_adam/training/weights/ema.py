"""`ModelAverage`: the exponential moving average of a model's weights and buffers (`--ema`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import broadcast_tensors
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import UserError
from hvd_adam.training.weights.buffers import Buffers


class ModelAverage:
    """The average a ← decay · a + (1 − decay) · w of every weight and floating-point buffer w of a model.

    Other buffers, such as counts, are copied. Every rank computes the average of its own model; weights are equal
    on all ranks, so their averages are too, and of buffers rank 0's average counts. Skipped updates do not count.

    Args:
        model: the model, before `distribute`, whose hooks a copy must not have.
        decay: in (0, 1).

    Raises:
        UserError: the model cannot be copied.

    Attributes:
        model: a copy of the model with the averages, in evaluation mode.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        try:
            self.model = copy.deepcopy(model).requires_grad_(False).eval()
        except Exception as error:
            raise UserError(f"--ema cannot copy the model, as copy.deepcopy does: {error!r}") from None
        self._decay = decay
        self._parameters = [*self.model.parameters()], [*model.parameters()]
        self._buffers = Buffers(self.model), Buffers(model)

    @torch.no_grad()
    def start(self, cluster: Cluster, saved: bool) -> None:
        """Makes the averages the same on all ranks, after `distribute`; every rank must call it.

        Args:
            cluster: this process.
            saved: rank 0 has loaded averages. Otherwise they start as the weights of the model.
        """
        averages, own = self._tensors()
        if not saved:
            for average, value in zip(averages, own, strict=True):
                average.copy_(value)
        elif cluster.size > 1:
            broadcast_tensors(averages, "hvd_adam.ema")

    @torch.no_grad()
    def update(self, skipped: Tensor | None) -> None:
        """Adds the weights after an update, without a device synchronization.

        Args:
            skipped: `DistributedAdam.skipped`.
        """
        pairs = [*zip(*self._tensors(), strict=True)]
        averages, own = ([pair[side] for pair in pairs if pair[0].is_floating_point()] for side in (0, 1))
        if skipped is None or skipped.is_cpu:
            if skipped:
                return
            torch._foreach_lerp_(averages, own, 1 - self._decay)
        else:  # the device decides
            changes = torch._foreach_sub(own, averages)
            torch._foreach_mul_(changes, torch.where(skipped, 0.0, 1 - self._decay))
            torch._foreach_add_(averages, changes)
        for average, count in pairs:
            if not average.is_floating_point():
                average.copy_(count)

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages under the names of the model's `state_dict`."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self.model.load_state_dict(state)

    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns parameters and buffers of the averages, and of the model."""
        averages, own = (
            [*(p.detach() for p in parameters), *buffers.now()]
            for parameters, buffers in zip(self._parameters, self._buffers, strict=True)
        )
        return averages, own
