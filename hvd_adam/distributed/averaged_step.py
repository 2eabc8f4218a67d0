"""`AveragedStep`: one update from the averaged gradients: unscale, clip, skip or update, exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.gradients.grad_scaling import (
    GradScaling,
    SkipCounter,
    is_nonfinite,
    multiply_gradients,
)
from hvd_adam.distributed.layout import DistributedLayout
from hvd_adam.distributed.strategies.allreduce import AllReduceStrategy
from hvd_adam.optim.fused import backend
from hvd_adam.optim.optimizer_state import Group, States

Update = Callable[[Tensor | None], None]


class AveragedStep:
    """The gradients of an optimizer from the end of backward to the end of the update.

    Args:
        optimizer: the optimizer that a loss scaler knows.
        parameters: returns its parameters.
        averager: makes `p.grad` the mean over the ranks.
        scaling: loss scale, clipping and the decision to skip.
        strategy: of the optimizer.
        layout: of the parameters and their gradients.

    Attributes:
        grad_norm: as in `DistributedAdam`.
        skips: counts skipped updates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Callable[[], list[Tensor]],
        averager: GradientAverager,
        scaling: GradScaling,
        strategy: AllReduceStrategy,
        layout: DistributedLayout,
    ) -> None:
        self._optimizer, self._parameters = optimizer, parameters
        self._averager, self._scaling = averager, scaling
        self._strategy, self._layout = strategy, layout
        self.grad_norm: Tensor | None = None
        self._skipped: Tensor | None = None
        self._probe: Tensor | None = None  # of the last update: not finite if it was skipped
        self.skips = SkipCounter()
        averager.noise.record_skip = self.skips.record
        # Factor that makes the averaged gradients the unscaled mean; None until they are averaged.
        self._unscale: float | Tensor | None = None

    @property
    def skipped(self) -> Tensor | None:
        """As in `DistributedAdam`. It is computed only if it is read, because that takes launches."""
        if self._skipped is None and self._probe is not None:
            with torch.inference_mode(False):
                self._skipped = is_nonfinite(self._probe)
        return self._skipped

    def forget(self) -> None:
        """Called when gradients have been cleared or used: what is known of them no longer holds."""
        self._unscale = None

    def synchronize(self) -> float | Tensor:
        """Waits until `p.grad` is the mean. Returns the factor that makes it the unscaled mean."""
        self.skips.record()  # by now the device has work queued after what this waits for
        self._averager.finish()
        if self._unscale is None:
            self._unscale = self._scaling.unscale_factor(self._optimizer)
            self._averager.noise.unscale(self._unscale)
        return self._unscale

    def _refuse_changed(self, unscale: float | Tensor) -> None:
        """Refuses gradients that were changed while they were not the mean: scattered, or times the loss scale."""
        if self._strategy.may_scatter:
            now = "is" if self._strategy.scatters else "may be, as the compression decides,"
            self._averager.refuse_changed(f"{now} the mean of this rank's shard only")
        elif isinstance(unscale, Tensor) or unscale != 1.0:
            self._averager.refuse_changed("is multiplied by the loss scale")

    def unscale(self) -> None:
        """Makes `p.grad` the unscaled mean: of this rank's shard, where gradients are reduce-scattered."""
        factor = self.synchronize()
        self._refuse_changed(factor)
        multiply_gradients(self._parameters(), factor)
        self._unscale = 1.0
        self._averager.look()

    def gather(self) -> None:
        """Makes `p.grad` the unscaled mean on every rank. Every rank must call it."""
        self.unscale()
        if self._strategy.scatters:
            self._averager.start_meeting("synchronize()")()
        self._strategy.gather_gradients(self._layout.buffers)

    def clip(self, max_norm: float) -> Tensor:
        """Clips the unscaled mean to a norm. Returns the norm before clipping, 0-dimensional."""
        self.unscale()
        if self._strategy.scatters:  # the norm is a collective
            self._averager.start_meeting("clip_grad_norm_()")()
        norm = self._strategy.norm_of_gradients(self._parameters(), self._layout.buffers)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        multiply_gradients(self._parameters(), factor)
        self._averager.look()
        return norm

    def last_norm(self) -> Tensor | None:
        """Returns the norm of the gradient that the last update used, before clipping; None without gradients."""
        if self._scaling.needs_norm:
            return self.grad_norm
        parameters = [p for p in self._parameters() if p.grad is not None]
        return self._strategy.norm_of_gradients(parameters, self._layout.buffers) if parameters else None

    def _start_meeting(self) -> Callable[[], None]:
        return self._averager.start_meeting("step()") if self._strategy.exchanges else lambda: None

    def update_behind(
        self, run: Callable[[Callable[[], None]], None], groups: Sequence[Group], state: States
    ) -> bool:
        """Updates each bucket as soon as its sum is there, while others arrive, if nothing needs all of them.

        Args:
            run: runs the optimizer's step with an update.
            groups: the parameter groups.
            state: the state of every parameter.

        Returns:
            Whether it has; else nothing has been changed, and `update` makes the update.
        """
        self.skips.record()
        if self._averager.reducer is None or not self._layout.updates_sections(groups, state):
            return False
        arrivals = self._averager.start_arrivals()
        if arrivals is None:
            return False
        self._skipped = torch.zeros((), dtype=torch.bool, device="cpu") if self._scaling.probes else None
        self._probe = None
        meet = self._start_meeting()
        with self._strategy.updating():
            run(partial(self._layout.store.update_sections, groups, arrivals))
        self._end_update(meet)
        return True

    def _end_update(self, meet: Callable[[], None]) -> None:
        if self._layout.feedback is not None:
            self._layout.feedback.commit()
        meet()
        with self._averager.waiting():
            self._strategy.exchange_parameters(self._layout.buffers)

    def update(self, run: Callable[[Callable[[], None]], None], groups: Sequence[Group], state: States) -> None:
        """Makes an update, or skips it if the averaged gradient is not finite, identically on all ranks.

        Args:
            run: runs the optimizer's step with an update.
            groups: the parameter groups.
            state: the state of every parameter.
        """
        unscale = self._unscale
        assert unscale is not None  # `synchronize` was called
        self._refuse_changed(unscale)
        parameters, scaling, buffers = self._parameters(), self._scaling, self._layout.buffers
        if all(p.grad is None for p in parameters):
            return
        store, finite_probe, probed = self._layout.store, None, None
        if scaling.needs_norm:
            self._start_meeting()()  # the norm is a collective where the state is sharded
            self.grad_norm = finite_probe = self._strategy.norm(parameters, buffers) * unscale
        elif scaling.needs_sum:
            finite_probe = self._averager.total
            if finite_probe is None and not buffers:
                probed = store.probe(groups)
                finite_probe = probed.one_if_finite if probed else None
            if finite_probe is None:
                finite_probe = self._strategy.finite_probe(parameters, buffers)
        self._skipped, self._probe, deferred = None, finite_probe if scaling.probes else None, False
        if self._probe is not None:
            if scaling.loss_scaler is not None:
                self._skipped = scaling.found_inf(self._probe, self._optimizer)
            deferred = store.all_fused and backend(self._probe.device.type).skips_nan
            deferred = deferred and self._layout.feedback is None  # the host has to know which residuals are valid
            if not deferred and self.skipped:  # if deferred, the kernel skips, and the host need not wait
                self.skips.add()
                return
        # In flight while the kernel runs, so that it takes no time of its own.
        meet = (lambda: None) if scaling.needs_norm else self._start_meeting()
        if probed and deferred:  # without clipping and loss scale there is no other factor
            factor: Tensor | None = probed.one_if_finite
        else:
            factor = scaling.combined(unscale, finite_probe, carries_found_inf=deferred)
        # The `step` of a derived class may change gradients and hyper-parameters.
        known = probed if self._layout.plain_step else None
        with self._strategy.updating():
            run(partial(store.update, groups, state, factor, known))
        self._end_update(meet)
        if deferred and self._probe is not None:
            self.skips.defer(self._probe, store.undo_step_counts)
