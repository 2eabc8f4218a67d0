"""`Rounds`: rounds of reductions of an optimizer's gradients, from the first bucket that is sent to the mean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.backward_pass import Callbacks, Hooks
from hvd_adam.distributed.gradients.grad_scaling import multiply_gradients
from hvd_adam.distributed.gradients.lockstep import ABORTED, Lockstep
from hvd_adam.distributed.gradients.reducer import Reducer
from hvd_adam.distributed.gradients.seen_gradients import SeenGradients
from hvd_adam.optim.update_rows import Arrival

_MOVED = (
    "parameters or options were changed while gradients are the mean of this rank's shard only, and these cannot "
    "follow: change them after step(), and call zero_grad() before the next backward()"
)


class Rounds:
    """The state of the round that is in flight; the base of `GradientAverager`, whose arguments it has.

    A round reduces every bucket once. If gradients came after their bucket was sent, another one follows.
    """

    reducer: Reducer | None = None
    hooks: Hooks | None = None

    def __init__(
        self, optimizer: Callbacks, lockstep: Lockstep, *, accumulate: int, deferred: bool, add: bool, watch: bool
    ) -> None:
        self._optimizer, self._lockstep = optimizer, lockstep
        self._accumulate, self._deferred, self._add, self._watch = accumulate, deferred, add, watch
        self.waited = 0.0
        self._announced = False  # whether a round has begun
        self._counted: set[Tensor] = set()  # parameters whose gradients are complete in this round
        self._late: set[Tensor] = set()  # parameters with gradients that came after their bucket was sent
        self._sent: tuple[dict[str, object], Tensor] | None = None  # facts and message of this round, once sent
        self._averaged = False  # whether every gradient is the mean
        self._divided = False  # whether gradients have been divided by the numbers of ranks and micro-batches
        self._moved = False  # whether their buckets have changed since, of which each rank has the mean of a shard
        self._adds_nothing = False  # whether this rank has left `join`, and means are over the others only
        self._aborted = 0  # passes that ended with an exception, since the last update
        self._total: Tensor | None = None
        self._seen = SeenGradients(optimizer.parameters, optimizer.names)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in this block as time that this process has waited for others."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def refuse_changed(self, state: str) -> None:
        """Refuses gradients that were changed while they were not the mean; see `SeenGradients`."""
        self._seen.refuse_changed(state)

    def look(self) -> None:
        """Remembers gradients and their states."""
        if self.reducer is not None or self._accumulate > 1 or self._watch:  # else nothing depends on them
            self._seen.look()

    # From the first bucket to the last.

    def _begin_last_round(self) -> None:
        if self._deferred and self._announced and self._sent is None:  # sending scales them
            self.refuse_changed("is being reduced (defer_averaging)")
        self._undo_division()  # also of gradients that an update has used, and that are not cleared
        self._announce()

    def _end_last_round(self) -> None:
        if self.reducer is not None:
            self.reducer.give_back()
        self._announced, self._averaged, self._divided = False, True, True
        self.look()

    def _announce(self) -> None:
        if not self._announced:
            self._optimizer.averaging_begins()
            self._announced = True

    @torch.no_grad()
    def _send_rest(self) -> None:
        """Sends what has not been sent in this round, and a message."""
        if self.reducer is None or self._sent is not None:
            return
        if not self.reducer.in_flight and not self._counted:  # no pass has begun, which would have done it
            self._optimizer.ensure_layout()
            self._respect_held_gradients()
        facts = self._optimizer.facts() | {ABORTED: self._aborted}
        self._sent = facts, self._lockstep.message(facts, again=bool(self._late))
        self.reducer.send_rest(self._sent[1])

    def _respect_held_gradients(self) -> None:
        self._seen.forget()  # which holds them, too
        if self.reducer is not None and not self.reducer.in_flight:
            self.reducer.respect_held_gradients()

    def _reduce(self) -> None:
        again = True
        while again:
            self._send_rest()
            assert self.reducer is not None and self._sent is not None
            facts, message = self._sent
            with self.waiting():
                reduced = self.reducer.finish(message, add=self._add)
            self._sent = None
            again = self._lockstep.check(reduced.message, facts)
            if again:
                self._take_late(self.reducer)
        self._total = reduced.total
        self._end_round()

    def _end_round(self) -> None:
        self._sent = None
        self._counted.clear()
        if self.hooks is not None:
            self.hooks.rearm()

    def _take_late(self, reducer: Reducer) -> None:
        """Adds the gradients that came after their bucket was sent to the mean, to be reduced in another round."""
        if self._adds_nothing:  # nor the mean, of which each of the others sends its part
            for p in self._optimizer.parameters():
                p.grad = None
            self._late.clear()
            return
        late = {p: p.grad for p in self._late}
        for p in self._late:
            p.grad = reducer.place(p)
        self._late.clear()
        self._divided = True
        self._undo_division()
        for p, grad in late.items():
            if grad is not None and p.grad is not None:
                p.grad.add_(grad)

    def buckets_change(self, *, shards_move: bool) -> None:
        """Called before gradients get other buckets.

        Args:
            shards_move: whether this rank's shard has other elements there.

        Raises:
            RuntimeError: it does, this rank has the mean of its shard only, and the next update would use it.
        """
        if self.reducer is not None and self.reducer.scatters and self._divided:
            self._moved = True
            if self._averaged and shards_move:
                self._refuse_moved()

    def _refuse_moved(self) -> None:
        gradients = [p.grad for p in self._optimizer.parameters() if p.grad is not None]
        if self._moved and any(map(torch.any, gradients)):
            raise RuntimeError(_MOVED)

    def _undo_division(self) -> None:
        """Makes the mean a local gradient again, to which more can be added."""
        if not self._divided:
            return
        self._refuse_moved()
        self._divided = self._moved = False
        if self.reducer is not None and self.reducer.scatters:
            self.reducer.spread()
        else:
            multiply_gradients(self._optimizer.parameters(), self._accumulate)

    def _arrive(self, reducer: Reducer) -> Iterator[Arrival]:
        arrivals = reducer.arrive()
        while True:
            with self.waiting():
                arrival = next(arrivals, None)
            if arrival is None:
                break
            yield arrival
        self._total = None
        self._end_round()
        self._end_last_round()
