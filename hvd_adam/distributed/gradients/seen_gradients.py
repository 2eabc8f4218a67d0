"""`SeenGradients`: notices that user code has changed, replaced or cleared gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class _State(NamedTuple):
    """What differs after a change in place, or after `gradient.data = ...`, as `Module.to` makes it."""

    version: int
    address: int

    @classmethod
    def of(cls, gradient: Tensor) -> _State:
        """Returns the state of a gradient; a sparse one has no address."""
        return cls(gradient._version, gradient.data_ptr() if gradient.layout is torch.strided else 0)


class SeenGradients:
    """The gradients of an optimizer and their states, when they were last looked at.

    Args:
        parameters: returns all parameters.
        names: returns a name for every parameter.
    """

    def __init__(
        self, parameters: Callable[[], Iterable[Tensor]], names: Callable[[], Mapping[Tensor, str]]
    ) -> None:
        self._parameters, self._names = parameters, names
        self._seen: list[tuple[Tensor, Tensor, _State]] = []  # parameter, gradient and its state

    def look(self) -> None:
        """Remembers gradients and their states."""
        self._seen = [(p, grad, _State.of(grad)) for p in self._parameters() if (grad := p.grad) is not None]

    def forget(self) -> None:
        """Forgets, and no longer holds, the gradients: from now on they may be changed."""
        self._seen = []

    def changed(self) -> Tensor | None:
        """Returns a parameter whose gradient was replaced, moved or changed in place, or None."""
        return next((p for p, grad, state in self._seen if p.grad is not grad or _State.of(grad) != state), None)

    def refuse_changed(self, state: str) -> None:
        """Refuses gradients that were changed while they were not the mean.

        Args:
            state: what they were instead, as in "it STATE".
        """
        p = self.changed()
        if p is not None:
            raise RuntimeError(
                f"the gradient of {self._names()[p]} was changed between backward() and step(), where "
                f"it {state}: call optimizer.synchronize() first, or clip with optimizer.clip_grad_norm_()"
            )

    def refuse_cleared(self, micro_batch: int, accumulate: int, *, after_pass: bool = False) -> None:
        """Refuses gradients that something else than the optimizer has cleared between two micro-batches.

        Args:
            micro_batch: number of micro-batches before.
            accumulate: micro-batches per update.
            after_pass: called after the next backward pass, which adds in place to gradients that are there.
        """
        for p, grad, state in self._seen:
            if after_pass:  # zeros may be what the pass has computed
                cleared = p.grad is not grad
            else:
                cleared = p.grad is None or (p.grad is grad and grad._version != state.version and not grad.any())
            if cleared:
                raise RuntimeError(
                    f"the gradient of {self._names()[p]} was cleared after {micro_batch} of "
                    f"{accumulate} micro-batches: call optimizer.zero_grad(), which keeps gradients until "
                    "the update, instead of model.zero_grad()"
                )
