"""Backward passes: a callback at their end, and the interfaces between averager, hooks and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Runs `callback` at the end of the backward pass that is running; of the outermost one, if passes are nested.

    Reentrant checkpointing runs backward passes inside a node of another one. Autograd's callbacks run at the end
    of the innermost pass: there, this waits for that node to end, and queues the callback with the pass around.
    """

    def end() -> None:
        node = torch._C._current_autograd_node()
        if node is None:
            callback()
            return

        def queue_again(*_: object) -> None:
            handle.remove()
            torch.autograd.Variable._execution_engine.queue_callback(end)

        handle = node.register_hook(queue_again)

    torch.autograd.Variable._execution_engine.queue_callback(end)
