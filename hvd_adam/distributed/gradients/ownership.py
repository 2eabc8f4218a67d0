"""Which optimizer averages the gradients of a parameter: the last one that was distributed for it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_adam.distributed.wire.error_feedback import ErrorFeedback

# Why an optimizer must not step: arguments of `Adam.supersede`.
REPLACED = "distribute() has returned another optimizer for its parameters; call step() on that"
RETIRED = "distribute() has been called again for its parameters; use the optimizer it returned"


class Owner(Protocol):
    """An optimizer that averages gradients."""

    param_groups: list[dict[str, Any]]
    error_feedback: ErrorFeedback | None

    def refuse_unfinished(self) -> None:
        """Raises a RuntimeError if gradients would be lost."""

    def retire(self) -> None:
        """Called when another optimizer takes over its parameters."""


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


def take_over(optimizer: Owner) -> None:
    """Makes an optimizer the owner of its parameters; `retire_others` comes before."""
    _owners.add(optimizer)


def retire_others(parameters: Iterable[Tensor]) -> list[Owner]:
    """Retires the optimizers that have averaged gradients of some of these parameters until now. Returns them."""
    mine, retired = set(parameters), []
    for other in list(_owners):
        if not mine.isdisjoint(_parameters_of(other)):
            other.refuse_unfinished()
            other.retire()
            _owners.discard(other)
            retired.append(other)
    return retired


def warn_of_unaveraged(model: torch.nn.Module) -> None:
    """Warns of gradients of a model that no optimizer averages: each rank would have its own."""
    averaged = {p for owner in _owners for p in _parameters_of(owner)}
    names = [name for name, p in model.named_parameters() if p.grad is not None and p not in averaged]
    if names:
        warnings.warn(
            f"hvd_adam: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} of the model have "
            "gradients but no distributed optimizer, so each rank has its own: a norm or a clipping over "
            "model.parameters() differs between ranks. Freeze them by requires_grad_(False), or give them to "
            "the optimizer",
            RuntimeWarning,
            stacklevel=2,
        )


def _parameters_of(owner: Owner) -> list[Tensor]:
    return [p for group in owner.param_groups for p in group["params"]]
