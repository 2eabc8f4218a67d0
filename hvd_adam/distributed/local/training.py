"""What a training does with islands, and with optimizers that have none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hvd_adam.distributed.broadcast.training import broadcast_buffers
from hvd_adam.distributed.context import Cluster
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.distributed.optimizer import DistributedAdam


def shared_weights(
    optimizer: DistributedAdam | LocalAdam, model: torch.nn.Module, cluster: Cluster
) -> AbstractContextManager[None]:
    """Returns a context in which a model has weights and buffers that are identical on all ranks.

    Every rank must call it. Without islands the weights are that already, and rank 0's buffers are broadcast.
    """
    if isinstance(optimizer, LocalAdam):
        return optimizer.outer_weights()
    broadcast_buffers(model, cluster)
    return nullcontext()


def shared_state_dict(model: torch.nn.Module, optimizer: DistributedAdam | LocalAdam) -> dict[str, Any]:
    """Returns the state dictionary of the model with weights that are identical on all ranks."""
    if not isinstance(optimizer, LocalAdam):
        return model.state_dict()
    with optimizer.outer_weights():
        return {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in model.state_dict().items()
        }


def islands_on_root(optimizer: DistributedAdam | LocalAdam) -> dict[str, Any] | None:
    """Returns `LocalAdam.islands_on_root`, or None without islands. Every rank must call it."""
    return optimizer.islands_on_root() if isinstance(optimizer, LocalAdam) else None


def islands_in_memory(optimizer: DistributedAdam | LocalAdam) -> dict[str, Any] | None:
    """Returns `LocalAdam.outer_state`, or None without islands."""
    return optimizer.outer_state() if isinstance(optimizer, LocalAdam) else None


def meet(optimizer: DistributedAdam | LocalAdam) -> None:
    """Ends the round of the islands, if there are any. Every rank must call it."""
    if isinstance(optimizer, LocalAdam):
        optimizer.meet()


def commits(optimizer: DistributedAdam | LocalAdam, due: bool, *, must: bool) -> bool:
    """Returns whether an elastic training copies its state to memory now. Every rank must call it after an update.

    Islands do so after each meeting.

    Args:
        optimizer: of the training.
        due: whether the interval of copies ends; without meaning for islands.
        must: copy in any case: islands meet before it.
    """
    if not isinstance(optimizer, LocalAdam):
        return due or must
    if must:
        optimizer.meet()
    return not optimizer.is_in_round
