"""Backward passes: nodes, a callback at their end, and the interfaces between averager, hooks and optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_adam.optim.plain_optimizer import not_compiled


class Hooks(Protocol):
    """What Horovod's wrapper, which counts complete buckets, needs."""

    def rearm(self) -> None:
        """Counts complete gradients from zero."""


@dataclass(frozen=True)
class Callbacks:
    """What the averager needs of its optimizer.

    Attributes:
        parameters: returns all parameters.
        names: returns a name for every parameter.
        ensure_layout: rebuilds flat storage, and with it the reducer, where it does not fit. Called while nothing
            is in flight.
        facts: returns what must be identical on all ranks, by name.
        averaging_begins: called before each round of reductions.
        backward_ended: called at the end of each backward pass.
    """

    parameters: Callable[[], list[Tensor]]
    names: Callable[[], Mapping[Tensor, str]]
    ensure_layout: Callable[[], None]
    facts: Callable[[], dict[str, object]]
    averaging_begins: Callable[[], None]
    backward_ended: Callable[[], None]


@torch.enable_grad()
def gradient_node(parameter: Tensor) -> Any:
    """Returns autograd's node that adds to the gradient of a parameter."""
    with trained(parameter):
        view: Any = parameter.expand_as(parameter)
        return view.grad_fn.next_functions[0][0]


@contextmanager
def trained(parameter: Tensor) -> Iterator[None]:
    """Makes a frozen parameter require gradients in this block: autograd has hooks for such parameters only."""
    frozen = not parameter.requires_grad
    if frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        if frozen:
            parameter.requires_grad_(False)


def at_end_of_backward(callback: Callable[[], None]) -> weakref.ref[Callable[[], None]]:
    """Runs `callback` at the end of the backward pass that is running; of the outermost one, if passes are nested.

    Reentrant checkpointing runs backward passes inside a node of another one. Autograd's callbacks run at the end
    of the innermost pass: there, this waits for that node to end, and queues the callback with the pass around.

    Returns:
        A reference that is dead once an exception has ended the pass; autograd drops the callback then.
    """
    end = _End(callback)
    torch.autograd.Variable._execution_engine.queue_callback(end)
    return weakref.ref(end)


class _End:
    """Calls back at the end of the outermost pass; in no reference cycle, so that it goes with its pass."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    @not_compiled
    def __call__(self) -> None:
        node = torch._C._current_autograd_node()
        if node is None:
            self._callback()
        else:
            self._handle = node.register_hook(self._queue_again)

    @not_compiled
    def _queue_again(self, *_: object) -> None:
        self._handle.remove()
        torch.autograd.Variable._execution_engine.queue_callback(self)


_waiting: dict[int, Callable[[], None]] = {}


def once_all_have_sent(number: int, wait: Callable[[], None]) -> None:
    """Called by a callback at the end of a backward pass: calls `wait` after all those callbacks.

    The gradients of several optimizers may come from one pass, which may reach them in another order on other
    ranks, or leave one out. Every rank must then have sent all before it waits for one, and wait in one order.

    Args:
        number: those with lower numbers wait first.
        wait: waits for other ranks.
    """
    _waiting[number] = wait
    torch.autograd.Variable._execution_engine.queue_callback(_wait_for_all)


@not_compiled
def _wait_for_all() -> None:
    for number in sorted(_waiting):
        _waiting.pop(number)()
