"""`GradientAverager`: makes every gradient the mean over the ranks by the time `backward` returns."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.backward_pass import Callbacks, at_end_of_backward, once_all_have_sent
from hvd_adam.distributed.gradients.grad_scaling import multiply_gradients
from hvd_adam.distributed.gradients.lockstep import Lockstep, asks_again
from hvd_adam.distributed.gradients.rounds import Rounds
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.optim.update_rows import Arrival

_numbers = itertools.count()


class GradientAverager(Rounds):
    """Follows the backward passes of an optimizer, and averages gradients over ranks and micro-batches.

    A backward pass outside `no_sync`, of the last micro-batch of an update, averages: its buckets are sent as they
    become complete, the one of the first parameters at the end of the pass, which waits for all. Every gradient is
    then the mean over the ranks of what it was on each of them, earlier gradients included, as under
    DistributedDataParallel. Other passes only add to local gradients.

    A gradient may become complete twice in one pass: reentrant checkpointing runs passes within the pass. What
    arrives after its bucket was sent is kept apart, and reduced in another round.

    Args:
        optimizer: see `Callbacks`.
        lockstep: writes and reads the message that travels with the gradients.
        accumulate: micro-batches per update.
        deferred: `finish` waits, which the optimizer's step calls, instead of the end of the pass.
        add: compute the sum of all elements of the averaged gradients.
        watch: notice changes of gradients on one rank, too.

    Attributes:
        option: of `distribute`, that makes gradients wait for `step`.
        noise: measures the noise scale.
        reducer: the buckets; None on one rank.
        hooks: Horovod's wrapper; None on one rank.
        micro_batch: index of the current micro-batch of the update.
        spoiled: whether the gradients have a part of a pass that ended with an exception.
        waited: seconds that this process has waited for the gradients, and parameters, of other ranks.
    """

    option = "defer_averaging"
    noise = NoiseMeter(None)

    def __init__(
        self, optimizer: Callbacks, lockstep: Lockstep, *, accumulate: int, deferred: bool, add: bool, watch: bool
    ) -> None:
        super().__init__(optimizer, lockstep, accumulate=accumulate, deferred=deferred, add=add, watch=watch)
        self._number = next(_numbers)
        self.micro_batch = 0
        self.spoiled = False
        self._syncs = True  # False inside no_sync
        # Autograd's numbers of the passes that are running, with what `at_end_of_backward` returns.
        self._tasks: dict[int, weakref.ref[Callable[[], None]]] = {}
        self._local = False  # whether the pass that is running averages nothing

    @property
    def in_flight(self) -> bool:
        """Whether reductions have begun that `finish` has not waited for."""
        return self._announced

    # Called by autograd.

    def before_accumulation(self, p: Tensor) -> bool:
        """Called before autograd adds to the gradient of a parameter.

        Returns:
            Whether the gradient is complete for this round afterwards, so that its bucket may be sent.
        """
        if torch.is_grad_enabled() and self.reducer is not None:
            raise RuntimeError(
                "backward(create_graph=True) gives gradients a graph, which cannot be averaged over ranks; use "
                "torch.autograd.grad(…, create_graph=True) for the inner gradient, and backward() for the loss"
            )
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            if not any(reference() for reference in self._tasks.values()):
                self.leave_aborted_pass()
                self._begin_pass()
            self._tasks[task] = at_end_of_backward(self._end_pass)
        if self.reducer is None:
            return False
        if p not in self._late and self.reducer.sent(p):
            self._late.add(p)
            p.grad = None
        counts = not self._local and p not in self._counted
        if counts:
            self._counted.add(p)
        return counts

    def after_accumulation(self, p: Tensor) -> None:
        """Called after autograd has added to the gradient of a parameter.

        If the parameter's dtype has changed, autograd has dropped the hook that calls the other method.
        """
        if torch._C._current_graph_task_id() not in self._tasks:
            self.before_accumulation(p)

    @torch.no_grad()
    def _begin_pass(self) -> None:
        if self.micro_batch and self._accumulate > 1:
            self._seen.refuse_cleared(self.micro_batch, self._accumulate)
        self._local = not self._syncs or self.micro_batch < self._accumulate - 1
        if not self._local:
            self._announce()
            if self.reducer is not None and not self.reducer.in_flight:
                self._optimizer.ensure_layout()
                self.reducer.pass_begins()
        self._undo_division()
        self._averaged = False
        if not self._local:
            self._respect_held_gradients()

    def _end_pass(self) -> None:
        if not self._tasks:
            return  # this pass has ended: it ran others within it
        self._tasks.clear()
        self._optimizer.backward_ended()
        self.look()
        if self.reducer is None and self.micro_batch == 0:
            self.noise.begin_on_one_rank(self._optimizer.parameters())
        if not self._local and not self._deferred:
            self._send_rest()
            once_all_have_sent(self._number, self.finish)
        elif self.reducer is not None:
            self.reducer.pass_ends()

    # Called by the optimizer.

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Makes backward passes in this block add to local gradients only."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    @torch.no_grad()
    def start_arrivals(self) -> Iterator[Arrival] | None:
        """Sends the rest of a round whose buckets can be used as they arrive. Every rank must call it.

        Returns:
            Waits for one bucket, or a part of it, after the other, with its number in `Reducer.number`; at the end
            every gradient is the mean. None where gradients must be complete first, so that `finish` is to be
            called: on one rank, if an element of a sum may be infinite, if no rank has gradients or one has late
            ones.

        Raises:
            RuntimeError, JobError, HorovodInternalError: as `finish`; nothing has been used.
        """
        self.leave_aborted_pass()
        if self._averaged or self.reducer is None or not self.reducer.ahead:
            return None
        self._begin_last_round()
        self._send_rest()
        assert self._sent is not None
        with self.waiting():
            header = self.reducer.header()
        if not header.sums_are_finite or asks_again(header.message) or not any(map(any, header.used)):
            return None
        self._lockstep.check(header.message, self._sent[0])
        return self._arrive(self.reducer)

    @torch.no_grad()
    def finish(self, *, again: bool = False) -> None:
        """Makes every gradient the mean over ranks and micro-batches, unless it is. Every rank must call it.

        Args:
            again: reduce even if it is, because other ranks have more to add.

        Raises:
            RuntimeError: deferred, and a gradient was changed since the pass.
            JobError: on every rank: the ranks have parted.
            HorovodInternalError: another rank has ended, or is in another collective.
        """
        self.leave_aborted_pass()
        if self._averaged and not again:
            return
        self._begin_last_round()
        if self.reducer is None:
            multiply_gradients(self._optimizer.parameters(), 1 / self._accumulate)
            self.noise.end_on_one_rank(self._optimizer.parameters())
        else:
            self._reduce()
        self._end_last_round()

    def finish_after_leaving(self, *, adds_nothing: bool) -> None:
        """Takes part in the reductions of the others, on a rank that has left `join`.

        Args:
            adds_nothing: the mean is over the others only.
        """
        self._adds_nothing = adds_nothing
        self.finish(again=True)
        self._adds_nothing = False

    def start_meeting(self, call: str) -> Callable[[], None]:
        """Called before other collectives of the optimizer: ranks that wait for gradients then fail, not hang.

        Args:
            call: what this rank does, for the error.

        Returns:
            Waits for the other ranks.
        """
        return (lambda: None) if self.reducer is None else self.reducer.start_meeting(call)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Compares facts of all ranks without gradients, for Adasum. Every rank must call it."""
        message = self._lockstep.message(facts, again=False)
        total = horovod().allreduce(message, op=horovod().Sum, name="hvd_adam.facts")
        self._lockstep.check(total.tolist(), facts)

    def updated(self) -> None:
        """Called after an update: gradients are to be reduced again, even if there is no pass before the next."""
        self._averaged = self.spoiled = False
        self._aborted = self.micro_batch = 0
        self.noise.updated()

    def cleared(self) -> None:
        """Called after all gradients have been cleared: an update starts."""
        self._averaged = self._divided = self._moved = self.spoiled = False
        self.micro_batch = 0
        self._seen.forget()

    def leave_aborted_pass(self) -> None:
        """Called outside backward: ends a pass that an exception has ended, with what it has sent."""
        if self._tasks:
            self._tasks.clear()
            self._aborted += 1
            self.spoiled = True
            if self._announced:
                self.finish()

    @property
    def total(self) -> Tensor | None:
        """A number, 0-dimensional float64, that is finite if and only if all elements of the gradients are.

        None if it is not known, or a gradient was changed since the reduction.
        """
        return None if self._total is None or self._seen.changed() is not None else self._total

    @property
    def averaged(self) -> bool:
        """Whether every gradient is the mean, or every one of this rank's shard."""
        return self._averaged

    def changes_are_welcome(self) -> None:
        """Called once gradients are the mean, and whole, on this rank: from now on they may be changed."""
        self._seen.forget()
        self._total = None
