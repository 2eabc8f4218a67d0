"""`DistributedAdam`: the optimizer that `distribute` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast import ROOT, broadcast_training_state
from hvd_adam.distributed.context import collective_prefix
from hvd_adam.distributed.grad_scaling import DeferredFlag, GradScaling, total_norm
from hvd_adam.distributed.horovod_adapter import move_step_hooks, prefixed
from hvd_adam.distributed.reducer import AveragingAdam
from hvd_adam.optim.adam import Adam, PlainOptimizer
from hvd_adam.optim.fused import backend


class DistributedAdam(AveragingAdam):
    """`Adam` with a `step` that averages the gradients over all ranks; `distribute` returns it.

    It is a `torch.optim.Optimizer`: learning-rate schedulers, step hooks, `param_groups` and `state_dict` work as
    with `torch.optim.Adam`. Reductions start in `backward`, bucket by bucket, and `step` waits for them.

    What `p.grad` holds on each rank (with `op="adasum"`: always this rank's own gradient):

    | moment | `p.grad` |
    |---|---|
    | after `backward` of a micro-batch that is not the last | sum of this rank's gradients so far |
    | after `backward` of the last micro-batch | undefined: the reduction is in flight; do not read or change it |
    | after `synchronize` | mean over ranks and micro-batches, without loss scale, not clipped |
    | after `step` that counted a micro-batch | unchanged |
    | after `step` that updated, with `synchronize` before it | unchanged |
    | after `step` that updated, without it | sum over ranks and micro-batches, times the loss scale |
    | after `zero_grad` | None; zero with `set_to_none=False`; unchanged between micro-batches of one update |

    If no rank has a gradient for a parameter, its `p.grad` is None after `synchronize` and `step`, and it is not
    updated. If only some ranks have one, the others count as zero.

    Every rank must call `step`, `synchronize`, `broadcast` and `add_param_group` equally often and in the same
    order. A rank without a batch calls `step` without `backward`. With `strategy="sharded"` the same holds for
    `state_dict` and `state_dict_on_root`. All other methods concern one rank only.

    Attributes:
        grad_norm: global 2-norm of the last averaged gradient before clipping, a 0-dimensional tensor; None
            without `max_grad_norm`.
        skipped: whether the last update was skipped, identical on all ranks, because the averaged gradient was not
            finite: a 0-dimensional bool tensor on the gradients' device. None if that is not checked.
    """

    # GradScaler.step would unscale gradients in flight. It leaves that to an optimizer with this attribute.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Adam,
        model: torch.nn.Module,
        *,
        accumulate: int,
        compression: str,
        op: str,
        max_grad_norm: float | None,
        loss_scaler: Any | None,
        skip_nonfinite: bool,
    ) -> None:
        # Not Adam's constructor: parameters, state and hyper-parameters are those of the given optimizer.
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        move_step_hooks(optimizer, self)
        self._configure(model, accumulate, compression, op)
        self._scaling = GradScaling(max_grad_norm, loss_scaler, skip_nonfinite)
        self._micro_batches = 0
        self._grad_scale: Tensor | None = None  # factor of the current update
        # Factor that makes the reduced gradients the unscaled mean; None until they are reduced.
        self._pending_grad_scale: float | Tensor | None = None
        self._sum: Tensor | None = None  # of all elements, where it is the finite_probe
        self.grad_norm: Tensor | None = None
        self.skipped: Tensor | None = None
        self._skipped_updates = 0
        self._deferred_skip: DeferredFlag | None = (
            None  # whether the last update was skipped, on its way to the host
        )
        broadcast_training_state(model, self, loss_scaler)
        self._ensure_layout()
        self._wrap(optimizer)

    @property
    def skipped_updates(self) -> int:
        """Number of updates skipped so far; waits for an update that is still running on a GPU. May be set."""
        self._record_deferred_skip()
        return self._skipped_updates

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._record_deferred_skip()
        self._skipped_updates = count

    # Called by a training loop.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients. Between micro-batches of one update it does nothing.

        Args:
            set_to_none: set gradients to None instead of zero.

        Raises:
            RuntimeError: called after `backward` and before `step`, while reductions are in flight.
        """
        if self._micro_batches:
            return
        if self._in_flight():
            raise RuntimeError("zero_grad() between backward() and step() would clear gradients in flight")
        self._pending_grad_scale = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(  # type: ignore[override]  # PyTorch declares two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Counts a micro-batch. Every `accumulate`-th call waits for the reductions and updates the parameters.

        The update uses the mean over ranks and micro-batches, unscaled and clipped as `distribute` was asked to.
        These factors are applied inside the update, so that `p.grad` is not the mean unless `synchronize` was
        called. Every rank must call it.

        Args:
            closure: computes the loss and its gradients; on one rank without accumulation only.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a closure on several ranks or with accumulation, since its `backward` would run after the
                reductions; a gradient of a parameter that was frozen when `distribute` was called; a GradScaler
                calls it.
        """
        loss = self._evaluate(closure)
        self._micro_batches += 1
        if self._micro_batches < self._accumulate:
            return loss
        if self._adasum:
            self._refuse_unhooked()
            self._horovod.step()
        else:
            self._reduce()
            self._update_scaled()
        self._micro_batches, self._pending_grad_scale = 0, None
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Waits for the reductions and makes `p.grad` the unscaled mean over ranks and micro-batches.

        Call it after the last `backward` of an update to read or change the averaged gradient; `step` then uses
        what `p.grad` holds. Every rank must call it. Without it, `step` waits for the reductions itself.

        Raises:
            RuntimeError: with Adasum, which averages no gradients; a gradient of a parameter that was frozen when
                `distribute` was called.
        """
        if self._adasum:
            raise RuntimeError("adasum combines updates, not gradients: there is no averaged gradient to wait for")
        grad_scale = self._reduce()
        if isinstance(grad_scale, Tensor) or grad_scale != 1.0:
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, grad_scale)
            self._pending_grad_scale = 1.0

    def broadcast(self) -> None:
        """Copies rank 0's parameters, buffers, state and hyper-parameters to all ranks. Every rank must call it.

        `distribute` has done so. Call it after `load_state_dict` on rank 0 only.
        """
        self._record_deferred_skip()
        broadcast_training_state(self._model, self, self._scaling.loss_scaler)

    # The rest of the interface of an optimizer.

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of `torch.optim.Adam`, as `Adam.state_dict` does."""
        self._record_deferred_skip()
        return dict(super().state_dict())

    def state_dict_on_root(self) -> dict[str, Any] | None:
        """Returns `state_dict` on rank 0 and None on the others. Every rank must call it if sharded."""
        return self.state_dict() if self._hvd.rank() == ROOT else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state on this rank, as `Adam.load_state_dict` does. `broadcast` copies rank 0's to the others.

        Args:
            state_dict: of this class, of `Adam`, or of `torch.optim.Adam` or `AdamW`.

        Raises:
            RuntimeError: called after `backward` and before `step`, while reductions are in flight.
            ValueError: it does not fit the parameters; nothing has been changed then.
        """
        if self._in_flight():
            raise RuntimeError("load_state_dict() between backward() and step() would mix two states")
        self._record_deferred_skip()  # belongs to the state that is replaced
        super().load_state_dict(state_dict)
        self._horovod.share(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train, with rank 0's values and options on every rank. Every rank must call it.

        Args:
            param_group: as `torch.optim.Optimizer.add_param_group` takes it.

        Raises:
            UserError: the group differs from rank 0's.
            ValueError: as `Adam` raises it.
        """
        if self._adapter is None:  # the constructor of torch.optim.Optimizer: the state exists already
            PlainOptimizer.add_param_group(self, param_group)
            return
        super().add_param_group(param_group)
        self._horovod.share(self)
        self.broadcast()
        if not self._single_rank:
            added = [p for p in self.param_groups[-1]["params"] if p.requires_grad]
            self._horovod.add_hooks(prefixed(collective_prefix(), self._names(), added))
            self._ensure_layout()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a distributed optimizer is tied to its process; copy or save its state_dict() instead")

    # One update.

    def _reduce(self) -> float | Tensor:
        """Waits for the reductions if that has not been done. Returns the factor that makes the mean of them."""
        if self._pending_grad_scale is not None:
            return self._pending_grad_scale
        self._record_deferred_skip()  # by now the device has work queued after what this waits for
        self._ensure_layout()
        mean_scale, self._sum = self._finish_reductions(add=self._scaling.needs_sum)
        self._pending_grad_scale = self._scaling.unscaled(mean_scale)
        return self._pending_grad_scale

    def _update_scaled(self) -> None:
        """Updates with one factor for mean, loss scale and clipping, unless the gradient is not finite."""
        if all(p.grad is None for p in self._parameters()):
            return
        scaling, grad_scale, finite_probe = self._scaling, self._reduce(), self._sum
        if scaling.needs_norm:
            finite_probe = self._norm() * grad_scale
        self.skipped, deferred = None, False
        if scaling.probes and finite_probe is not None:
            self.skipped = scaling.found_inf(finite_probe, self)
            deferred = self._only_the_device_knows()
            if not deferred and self.skipped:
                self._skipped_updates += 1
                return
        if scaling.clips:
            self.grad_norm = finite_probe
        self._grad_scale = scaling.combined(grad_scale, finite_probe, carries_found_inf=deferred)
        self._horovod.step()  # calls `_update`, inside the `step` of a user's subclass of Adam
        if deferred and self.skipped is not None:
            self._deferred_skip = DeferredFlag(self.skipped)

    def _only_the_device_knows(self) -> bool:
        """Returns whether the kernel skips the update by itself, so that the host need not wait for that."""
        fused = all(implementation == "fused" for implementation in self._implementations)
        return (
            self.skipped is not None
            and backend(self.skipped.device.type).skips_nan
            and fused
            and not self._unflattened
        )

    def _record_deferred_skip(self) -> None:
        """Counts an update that was skipped on the device, and takes back its step counts."""
        deferred, self._deferred_skip = self._deferred_skip, None
        if deferred is not None and deferred.read():
            self._skipped_updates += 1
            for flat in self._storages:
                flat.undo_step_counts()

    def _norm(self) -> Tensor:
        """Returns the 2-norm of all gradients as they are."""
        return total_norm([p.grad for p in self._parameters() if p.grad is not None])

    def _evaluate(self, closure: Callable[[], float] | None) -> float | None:
        if hasattr(self, "found_inf"):
            raise RuntimeError("give the GradScaler to distribute(loss_scaler=…) and call optimizer.step() itself")
        if closure is None:
            return None
        if not self._single_rank or self._accumulate > 1:
            raise RuntimeError("step(closure) works on one rank without accumulation only; call step() instead")
        with torch.enable_grad():
            return closure()

    def _build_layout(self) -> None:
        self._record_deferred_skip()  # while the buffers are those of the last step
        super()._build_layout()

    def _update_from_step(self) -> None:
        self._update(self._grad_scale)
