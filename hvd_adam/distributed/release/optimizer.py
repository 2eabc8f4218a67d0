"""`ReleasingAdam`: what `distribute` returns with `release_gradients=True`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.gradients.grad_scaling import probe_of
from hvd_adam.distributed.gradients.lockstep import facts_of_groups
from hvd_adam.distributed.layout import DistributedLayout
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.distributed.release.averager import ReleasingAverager
from hvd_adam.distributed.release.layout import ReleasingLayout
from hvd_adam.errors import JobError, UserError
from hvd_adam.optim.adam import Adam
from hvd_adam.optim.optimizer_state import States
from hvd_adam.optim.update_rows import HyperParameters, hyper_parameters

_BETWEEN = (
    "between backward() and step() would mix two updates: release_gradients=True has begun one in backward()"
)


class ReleasingAdam(DistributedAdam):
    """A `DistributedAdam` that updates during `backward`, and gives the memory of gradients back at once.

    As soon as the gradients of a bucket are complete, they are averaged over the ranks, the parameters of the
    bucket are updated, and their `p.grad` is None. `step` does so for what is left, and counts the update. Between
    the two, `p.grad` is a `ReleasedGradient`, which raises a RuntimeError if it is used. Weights
    and state have the bits of the ordinary update. Each of several ranks has at most two bucket buffers, one rank
    has none.

    - Hyper-parameters are those at the first gradient of `backward`; `step` refuses others.
    - Weights change during `backward`. Autograd raises a RuntimeError if it needs old ones later in the same pass.
    - The whole gradient is never there: clipping, its norm and everything else that needs it are refused.
    - An element of an averaged gradient that is not finite raises a `JobError` on every rank. Its bucket is not
      updated, but others may have been.

    Args:
        optimizer: the optimizer that was given to `distribute`, whose arguments the others are.
        model: as there.
        options: as there, `require_releasable` has checked them.
    """

    averager_class: type[GradientAverager] = ReleasingAverager
    layout_class: type[DistributedLayout] = ReleasingLayout
    _averager: ReleasingAverager
    _numbers: Sequence[HyperParameters]  # of the update that has begun
    _began_with: dict[str, object]  # its hyper-parameters by name

    def __init__(self, optimizer: Adam, model: torch.nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **{**options, "defer_averaging": True})
        self._averager.apply = self._update_bucket
        # The message that is compared leaves before the first bucket, which has the last parameters.
        self._same_batches.look_at(lambda: self._parameters()[::-1])

    @property
    def gradient_buffer_bytes(self) -> int:
        """Bytes of gradients on this rank that are in no `p.grad`: of buckets in flight, and of free buffers."""
        return self._averager.buckets.nbytes

    def _averaging_begins(self) -> None:
        super()._averaging_begins()
        self._numbers, self._began_with = hyper_parameters(self.param_groups), facts_of_groups(self.param_groups)

    def _update_bucket(self, number: int) -> None:
        """Updates the parameters of a bucket that have gradients, which are the mean.

        Raises:
            JobError: a gradient is not finite, on every rank; its bucket is not updated.
        """
        for p in self._averager.buckets.parameters(number):
            if p.grad is not None and p.numel() and not probe_of([p.grad]).isfinite():
                raise JobError(
                    f"the gradient of {self._names()[p]} is not finite in update {self._updates + 1}, which "
                    "release_gradients cannot skip, since it may have updated other weights: continue from the "
                    "last checkpoint, and look at the data, lower lr, or leave the option out"
                )
        self._store.update_section(number, self.param_groups, self._numbers)

    def _update_averaged(self) -> None:
        if torch._C._current_graph_task_id() >= 0:
            raise RuntimeError("step() inside backward(), such as in a hook: call it after backward()")
        if self._averager.in_flight:
            self._refuse_changed_options()
        self._averager.finish()
        self._store.sections_updated(self.param_groups, released=True)
        self._horovod.step(lambda: None)  # weights are updated; a scheduler looks whether step() was called

    def _refuse_changed_options(self) -> None:
        before, now = self._began_with, facts_of_groups(self.param_groups)
        for name in before | now:
            old, new = before.get(name), now.get(name)
            if repr(old) != repr(new):
                raise RuntimeError(
                    f"{name} changed from {old} to {new} between backward() and step(), but release_gradients=True"
                    " has updated weights in backward(): change hyper-parameters before backward() or after step()"
                )

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if hasattr(self, "found_inf"):
            raise RuntimeError(
                "GradScaler.step() cannot unscale gradients that release_gradients=True has used already: train "
                "without a loss scaler, as with bfloat16, or leave the option out"
            )
        if closure is not None:
            self._refuse("step(closure)")
        return None

    # What would see some weights before, and some after the update.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients of the loop's own; `step` has released the others.

        Raises:
            RuntimeError: called between `backward` and `step`.
        """
        self._refuse_in_flight(
            f"zero_grad() {_BETWEEN}; or, if that was for another optimizer, as of a GAN, freeze these parameters "
            "by requires_grad_(False) before its forward pass"
        )
        super().zero_grad(set_to_none)

    def retire(self) -> None:
        """As in `DistributedAdam`."""
        super().retire()
        self._averager.retire()

    def broadcast(self) -> None:
        """As in `DistributedAdam`.

        Raises:
            RuntimeError: called between `backward` and `step`.
        """
        self._refuse_in_flight(f"broadcast() {_BETWEEN}")
        super().broadcast()

    def _whole_state(self, call: str, *, on_root_only: bool = False) -> States:
        self._refuse_in_flight(f"{call} {_BETWEEN}")
        return super()._whole_state(call, on_root_only=on_root_only)

    # What needs the whole gradient, or several passes.

    def _refuse(self, call: str) -> NoReturn:
        raise UserError(
            f"{call} needs gradients that release_gradients=True of distribute() has given back: leave out one of "
            "both"
        )

    def finite_grad_norm(self) -> None:
        """Returns None: the whole gradient is never there."""

    def synchronize(self) -> NoReturn:
        """Raises a `UserError`, as everything that needs the whole gradient."""
        self._refuse("synchronize()")

    def clip_grad_norm_(self, max_norm: float) -> NoReturn:
        """Raises a `UserError`, as everything that needs the whole gradient."""
        self._refuse("clip_grad_norm_()")

    def no_sync(self) -> NoReturn:
        """Raises a `UserError`: an update has one backward pass."""
        self._refuse("no_sync()")

    def join(self, divide_by_initial_world_size: bool = True) -> NoReturn:
        """Raises a `UserError`: a rank that has left the loop could not take part in the backward passes."""
        self._refuse("join()")

    def register_step_pre_hook(self, hook: Any) -> NoReturn:
        """Raises a `UserError`: such a hook would find no gradients."""
        self._refuse("register_step_pre_hook()")
