"""`ReleasingAverager`: averages and uses gradients bucket by bucket, while the backward pass is running."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import start_allreduce
from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.gradients.backward_pass import gradient_node
from hvd_adam.distributed.gradients.lockstep import ABORTED
from hvd_adam.distributed.gradients.missing_ranks import explained, start_meeting
from hvd_adam.distributed.release.buckets import ReleasedBuckets
from hvd_adam.distributed.release.stand_ins import StandIns
from hvd_adam.optim.plain_optimizer import not_compiled

_TORN = (
    "an exception ended backward() or step() after release_gradients=True had updated some weights, so they are "
    "of two updates: load a checkpoint into the model and a new Adam, and call distribute() again"
)


class ReleasingAverager(GradientAverager):
    """Follows one backward pass per update, whose buckets are updated and released while it is running.

    Before the first bucket a message travels, as with other gradients (`Lockstep`). It is read before the first
    update: ranks that have parted change nothing. What comes later cannot undo the updates before it, so
    whatever makes a second round necessary is refused. The arguments are those of `GradientAverager`.

    Attributes:
        buckets: set by `arrange`.
        apply: updates the parameters of a bucket; set by the optimizer.
    """

    option = "release_gradients"
    buckets: ReleasedBuckets
    apply: Callable[[int], None]
    _prefix: str | None = None  # of the names of the collectives; None on one rank, and before the first layout
    _message: tuple[Callable[[], None], Tensor, dict[str, object]] | None = None  # in flight
    _torn = False  # whether the weights are of two updates

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stand_ins = StandIns()
        self._nodes: dict[Any, Any] = {}  # autograd's, which live as long as their hooks must, with the handles

    def arrange(self, buckets: ReleasedBuckets, prefix: str | None) -> None:
        """Replaces the buckets. Nothing may be in flight.

        Args:
            buckets: the new ones.
            prefix: prefix of the names of the collectives, identical on all ranks; None on one rank.
        """
        self.buckets, self._prefix = buckets, prefix
        self._stand_ins.forget()

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Makes autograd report gradients after all other hooks: hooks of the loop can read and change them."""
        for p in parameters:
            node = gradient_node(p)
            if node not in self._nodes:
                self._nodes[node] = node.register_hook(functools.partial(self._gradient_is_there, p))

    def retire(self) -> None:
        """Removes the hooks."""
        for handle in self._nodes.values():
            handle.remove()
        self._nodes.clear()

    @property
    def in_flight(self) -> bool:
        """Whether an update has begun in a backward pass, and has not been abandoned with it."""
        return self._announced and not self._tasks and not self._torn

    # Called by autograd.

    def before_accumulation(self, p: Tensor) -> bool:
        """As in `GradientAverager`. Horovod's hooks count nothing: the gradient never counts as complete."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward(create_graph=True) gives gradients a graph, which release_gradients would cut; use "
                "torch.autograd.grad(…, create_graph=True) for the inner gradient, and backward() for the loss"
            )
        super().before_accumulation(p)
        if self.buckets.released(p):
            raise RuntimeError(
                f"{self._optimizer.names()[p]} gets another gradient in this backward pass, after its update has "
                "been made: a pass within the pass, as of reentrant checkpointing (use_reentrant=False has none), "
                "cannot be used with release_gradients=True"
            )
        self.buckets.expect(p)
        return False

    @not_compiled
    @torch.no_grad()
    def _gradient_is_there(self, p: Tensor, *_: object) -> None:
        if torch._C._current_graph_task_id() in self._tasks:
            self.buckets.add(p)

    @torch.no_grad()
    def _begin_pass(self) -> None:
        if self._announced:
            raise RuntimeError(
                "a second backward() before step() cannot be used with release_gradients=True, which has updated "
                "weights in the first one: add the losses and call backward() once, or leave the option out"
            )
        self._local = False
        self._announce()
        self._optimizer.ensure_layout()

    @torch.no_grad()
    def _end_pass(self) -> None:
        ends = bool(self._tasks)  # or it has ended: it ran others within it
        super()._end_pass()
        if ends:
            self._stand_ins.hide(self._optimizer.parameters(), self.buckets.released)

    # Called by the buckets.

    def round_begins(self) -> None:
        """Sends what must be identical on all ranks."""
        assert self._prefix is not None  # nothing is sent on one rank
        facts = self._optimizer.facts() | {ABORTED: self._aborted}
        message = self._lockstep.message(facts, again=False)
        self._message = start_allreduce(message, self._name_of_message), message, facts

    def use(self, number: int) -> None:
        """Updates the parameters of a bucket, once it is known that all ranks agree.

        Raises:
            JobError: on every rank: the ranks have parted; nothing has been updated.
        """
        self._receive_message()
        self.apply(number)

    def _receive_message(self) -> None:
        if self._message is None:
            return
        wait, message, facts = self._message
        with self.waiting(), explained():
            wait()
        self._message = None
        self._lockstep.check(message.tolist(), facts)

    @property
    def _name_of_message(self) -> str:
        return f"{self._prefix}.message"

    # Called by the optimizer.

    @torch.no_grad()
    def finish(self, *, again: bool = False) -> None:
        """Reduces, uses and releases the gradients that are left. Every rank must call it.

        Args:
            again: no effect.

        Raises:
            RuntimeError: an exception has ended the backward pass; gradients were changed since.
            JobError: on every rank: the ranks have parted.
            HorovodInternalError: another rank has ended, or is in another collective.
        """
        self.leave_aborted_pass()
        self._stand_ins.reveal(self._optimizer.names)
        if not self._announced:  # without a backward pass
            self._announce()
            self._optimizer.ensure_layout()
        self._torn = True
        self.buckets.finish()
        self.buckets.rearm()
        self._announced = self._torn = False

    def start_meeting(self, call: str) -> Callable[[], None]:
        """As in `GradientAverager`."""
        if self._prefix is None:
            return lambda: None
        return start_meeting(self._name_of_message, torch.device("cpu"), call)

    def leave_aborted_pass(self) -> None:
        """Called outside backward, after which an exception may have ended it.

        Raises:
            RuntimeError: some buckets have been updated, or sent to the other ranks.
        """
        if self._tasks:
            self._tasks.clear()
            self._aborted += 1
            self._announced = False
            self._torn = not self.buckets.untouched
            self.buckets.rearm()
        if self._torn:
            raise RuntimeError(_TORN)
