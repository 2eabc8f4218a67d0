"""`LocalAdam`: what `distribute` returns with `strategy="local"`: local steps between rare meetings."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import current_cluster
from hvd_adam.distributed.gradients.grad_scaling import is_nonfinite, probe_of, total_norm
from hvd_adam.distributed.gradients.lockstep import STEPS, UPDATES, facts_of_groups
from hvd_adam.distributed.gradients.seen_gradients import SeenGradients
from hvd_adam.distributed.local.island_adam import IslandAdam
from hvd_adam.errors import JobError, UserError
from hvd_adam.optim.adam import Adam
from hvd_adam.optim.plain_optimizer import not_compiled

_MOST_DROPPED = 3  # rounds in a row


class LocalAdam(IslandAdam):
    """`Adam` that makes local steps, and averages the progress of all islands once in a round (DiLoCo).

    Each rank is an island, or `islands` of `distribute` groups the ranks. An island makes `local_steps` updates of
    its own, with its own gradients, moments, clipping and loss scale. In one of several ranks `step` averages the
    gradients, so weights and state are identical on them. Then all islands meet: the difference of outer and local
    weights is averaged, an outer SGD with Nesterov momentum applies it to the outer weights (Douillard et al.,
    arXiv 2311.08105, algorithm 1), and every island continues from those, which have identical bits on all ranks.
    Buffers of floating point are averaged at meetings, too.

    Between meetings the weights of the islands differ. Evaluate and save in `outer_weights`.

    Every rank must call `step` equally often, and with the same hyper-parameters at a meeting, where that is
    checked. An island skips an update if its own gradient is not finite. If the mean of the differences is not
    finite, all islands drop the round: they return to the outer weights, and the islands whose own weights are not
    finite also to an Adam state of zeros.
    """

    def __init__(
        self, optimizer: Adam, model: torch.nn.Module, *, local_steps: int, accumulate: int, **options: Any
    ) -> None:
        super().__init__(optimizer, model, accumulate=accumulate, **options)
        self._local_steps, self._accumulate = local_steps, accumulate
        self._micro_batch = 0
        self._seen = SeenGradients(lambda: self._parameters, self._names)
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self.dropped_rounds = self._dropped_in_a_row = 0
        self._updates = 0
        if self._scaling.loss_scaler is not None or accumulate > 1 or self._averaging is not None:
            self._step_supports_amp_scaling = True  # GradScaler.step must not unscale: then step() refuses it

    @torch.no_grad()
    def finite_grad_norm(self) -> float | None:
        """Returns the 2-norm of this island's last gradient before clipping; None if it was not finite.

        It waits for the device. Call it between `step` and `zero_grad`. It concerns this rank alone.
        """
        gradients = self._gradients()
        if not gradients:
            return None
        norm = self.grad_norm if self.grad_norm is not None else total_norm(gradients) / self._summands
        return norm.item() if math.isfinite(norm.item()) else None

    @not_compiled
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. Between micro-batches of one update it does nothing.

        Args:
            set_to_none: set gradients to None instead of zero.

        Raises:
            RuntimeError: a backward pass between two micro-batches was not followed by `step`.
        """
        if not self._micro_batch:
            super().zero_grad(set_to_none)
            return
        changed = self._seen.changed()
        if changed is not None:
            raise RuntimeError(
                f"the gradient of {self._names()[changed]} was changed after {self._micro_batch} of "
                f"{self._accumulate} micro-batches, by a backward pass without step(): with strategy='local' an "
                "update whose micro-batch has failed cannot start again; end the job, and resume it"
            )

    @torch.inference_mode(False)  # what is received in it could not be used outside
    @torch.no_grad()
    def step(  # type: ignore[override]  # PyTorch declares two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Counts a micro-batch; every `accumulate`-th call updates, and every `local_steps`-th update meets.

        Args:
            closure: computes the loss and its gradients; called once.

        Returns:
            The closure's loss on this rank, or None.

        Raises:
            RuntimeError: `distribute` has been called again for these parameters; a parameter is trained that was
                frozen when it was called; a GradScaler calls it that was given to `distribute`; gradients were
                cleared between two micro-batches.
            JobError: on every rank, at a meeting: hyper-parameters differ between ranks. In an island of several
                ranks, on all of them in the first such update.
        """
        self.refuse_superseded()
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler.step() cannot unscale these gradients: give the GradScaler to "
                "distribute(loss_scaler=…) and call optimizer.step() itself"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._micro_batch:
            self._seen.refuse_cleared(self._micro_batch, self._accumulate, after_pass=True)
        self._micro_batch += 1
        if self._micro_batch < self._accumulate:
            self._seen.look()
            return loss
        self._seen.forget()
        self._micro_batch = 0
        self._step_locally()
        self._updates, self._updates_in_round = self._updates + 1, self._updates_in_round + 1
        if self._updates_in_round >= self._local_steps:
            self.meet()
        return loss

    @torch.inference_mode(False)
    @torch.no_grad()
    def meet(self) -> None:
        """Ends the round: all islands average their progress and make the outer step. Every rank must call it.

        `step` calls it after every `local_steps` updates. Call it at the end of a training, so that the outer
        weights contain its last updates. Without updates since the last meeting it does nothing.

        Raises:
            JobError: on every rank: hyper-parameters differ between ranks, or three rounds in a row were dropped.
        """
        if not self._updates_in_round:
            return
        difference = self._outer.difference()
        is_own_finite = bool(difference.isfinite().all())
        self._exchange_counts()
        self._mean.average(difference)
        if bool(difference.isfinite().all()):
            self._mean.commit()
            self._outer.step(difference)
            self._buffers.average()
            self._dropped_in_a_row = 0
        else:
            self._mean.roll_back()
            self._buffers.write()
            self._record_drop()
            if not is_own_finite:
                self.state.clear()
                for group in self.param_groups:
                    self._make_missing_state(group)
        self._outer.write()
        self._updates_in_round = 0

    def _record_drop(self) -> None:
        self.dropped_rounds, self._dropped_in_a_row = self.dropped_rounds + 1, self._dropped_in_a_row + 1
        problem = f"the weights of an island are not finite after {self._updates_in_round} local updates"
        if self._dropped_in_a_row >= _MOST_DROPPED:
            raise JobError(f"{problem}, in {_MOST_DROPPED} rounds in a row; the outer weights are good: lower lr")
        if current_cluster().is_root:
            logging.getLogger("hvd_adam").warning(f"{problem}: all islands drop this round")

    def _exchange_counts(self) -> None:
        """Exchanges the counts of skipped updates, and compares hyper-parameters."""
        cluster = current_cluster()
        facts = facts_of_groups(self.param_groups)
        own = {
            "skipped": self._skipped,
            "in a row": self._in_a_row,
            "updates": self._updates_in_round,
            "facts": zlib.crc32(repr([*facts.items()]).encode()),
        }
        ranks = cluster.gather(own)
        for rank, island in enumerate(ranks):
            for name, what in (("updates", "local updates in this round"), ("facts", "hyper-parameters")):
                if island[name] != ranks[0][name]:
                    raise JobError(
                        f"the islands have different {what}: rank {rank} differs from rank 0. Call step() equally "
                        "often, and set hyper-parameters from values that are identical on all ranks"
                    )
        islands = ranks[:: self._islands.size]  # of the leaders
        self.skipped_updates += sum(island["skipped"] for island in islands)
        self._skipped = 0
        self.skipped_in_a_row = max(island["in a row"] for island in islands)

    def _step_locally(self) -> None:
        """Makes this island's update from its gradients, or skips it if they are not finite."""
        self._refuse_unfrozen()
        if self._averaging is not None:
            self._averaging.average(self._facts())
        gradients, scaling = self._gradients(), self._scaling
        self.skipped = None
        if not gradients:
            return
        factor = scaling.unscale_factor(self) / self._summands
        probe = None
        if scaling.needs_norm:
            self.grad_norm = probe = total_norm(gradients) * factor
        elif scaling.needs_sum:
            probe = probe_of(gradients)
        if scaling.probes and probe is not None:
            has_scaler = scaling.loss_scaler is not None
            self.skipped = scaling.found_inf(probe, self) if has_scaler else is_nonfinite(probe)
            if self.skipped:  # on a GPU the host waits here
                self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
                return
        self._in_a_row = 0
        self._run_step(scaling.combined(factor, probe, carries_found_inf=False))

    @property
    def _summands(self) -> int:
        """By how much to divide gradients in `step`, once they are averaged."""
        return self._accumulate if self._averaging is None else 1

    def _facts(self) -> dict[str, object]:
        steps = sum(float(state.get("step", 0.0)) for p in self._parameters if (state := self.state.get(p)))
        return {UPDATES: self._updates, STEPS: steps} | facts_of_groups(self.param_groups)

    def _run_step(self, grad_scale: Tensor | None) -> None:
        """Runs the `step` of the optimizer's class, which may be the user's, with the update of this one."""

        def update() -> None:
            self._store.ensure_layout(self.param_groups, self.state)
            self._store.update(self.param_groups, self.state, grad_scale)

        inner = self._inner
        inner._opt_called = True  # type: ignore[attr-defined]  # what a scheduler made for it looks for
        if inner.steps_plainly:
            update()
            return
        inner.update_by(update)
        try:
            inner.step()
        finally:
            del inner.__dict__["_update"]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None and p.grad.numel()]

    def _refuse_unfrozen(self) -> None:
        known = {*self._parameters}
        if any(p.grad is not None and p not in known for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                "a parameter has a gradient but was frozen when distribute() was called, so islands would not "
                "average it: call meet() and distribute() after unfreezing"
            )

    # What averages gradients, which no island does.

    def no_sync(self) -> AbstractContextManager[None]:
        """Refuses: no gradient is averaged.

        Raises:
            UserError: always.
        """
        raise UserError("no_sync() has no effect with strategy='local', which averages no gradients: leave it out")

    def join(self, divide_by_initial_world_size: bool = True) -> AbstractContextManager[None]:
        """Refuses: all islands make the same number of steps.

        Raises:
            UserError: always.
        """
        raise UserError(
            "join() cannot be used with strategy='local', whose islands make the same number of steps: use "
            "StatefulDistributedSampler, which gives all ranks as many batches"
        )

    def synchronize(self) -> None:
        """Refuses: no gradient is averaged.

        Raises:
            UserError: always.
        """
        raise UserError("synchronize() has no effect with strategy='local'; meet() averages the weights")

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips this island's gradient, as `torch.nn.utils.clip_grad_norm_`. It concerns this rank alone.

        Raises:
            UserError: with a loss scaler, `accumulate` > 1, or several ranks in an island, where gradients are
                unscaled and averaged in `step`.
        """
        if self._averaging is not None:
            raise UserError("clip_grad_norm_() comes before step() averages these gradients: use max_grad_norm")
        if self._scaling.loss_scaler is not None or self._accumulate > 1:
            raise UserError("clip_grad_norm_() sees scaled gradients here: use max_grad_norm of distribute()")
        return torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
