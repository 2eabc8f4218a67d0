"""`DistributedAdam`: drives `hvd.DistributedOptimizer`, with what that wrapper gets wrong put right.

The wrapper makes the optimizer anew (losing its state), sums over accumulated micro-batches, cannot clip or
unscale before it averages, steps parameters that no rank has a gradient for, fires step hooks twice, copies every
gradient into and out of a buffer, and lets sums depend on timing. None of this reaches the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvd_adam.distributed.broadcast import ROOT, broadcast_training_state
from hvd_adam.distributed.compression import AdasumWire
from hvd_adam.distributed.context import collective_prefix, horovod
from hvd_adam.distributed.deferred_flag import DeferredFlag
from hvd_adam.distributed.launch_env import elastic_disabled
from hvd_adam.distributed.reducer import BUCKET_BYTES, Reducer, sum_of
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam, PlainOptimizer
from hvd_adam.optim.flat_layout import Layout
from hvd_adam.optim.flat_storage import FlatStorage
from hvd_adam.optim.fused import backend

_NORM_ELEMENTS = 1 << 18  # a norm is summed in pieces of this size, for float32's sake


class DistributedAdam(Adam):
    """What `distribute` returns: an `Adam` whose `step` first averages the gradients over all ranks.

    It owns parameter groups and state. `hvd.DistributedOptimizer`, inside, shares them, and says from its backward
    hooks which buckets are ready; they are reduced where they lie.

    Attributes:
        grad_norm: global 2-norm of the last averaged gradient before clipping, a 0-dim tensor; None without
            `max_grad_norm`.
        skipped: whether the last update was left out, on all ranks alike, because the averaged gradient was not
            finite: a 0-dim bool tensor on the gradients' device; None where nobody looks.
    """

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
        self._wrapper: Any = None
        # Not Adam's constructor: parameters, state and hyper-parameters are those of the optimizer given.
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        for name, hooks in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)  # what was registered before is called from now on by this one
        self._hvd = horovod()
        self._prefix = collective_prefix()  # of the names of its collectives
        self._model = model
        self._accumulate, self._compression, self._max_grad_norm = accumulate, compression, max_grad_norm
        self._loss_scaler = loss_scaler if loss_scaler is not None and loss_scaler.is_enabled() else None
        # Where there is a norm of the gradient anyway, it tells whether all elements are finite.
        self._skip_nonfinite = skip_nonfinite
        self._sums = skip_nonfinite and max_grad_norm is None and self._loss_scaler is None
        self._single_rank = self._hvd.size() == 1
        self._adasum = op == "adasum" and not self._single_rank
        self._always_flat = not self._single_rank and not self._adasum
        self._reducer: Reducer | None = None
        self._micro_batches = 0
        self._grad_scale: torch.Tensor | None = None  # of the update under way
        # What the gradients lack to be the mean, once they are reduced.
        self._pending_grad_scale: float | torch.Tensor | None = None
        self._sum: torch.Tensor | None = None  # of all elements, if asked for: finite if they are
        self.grad_norm: torch.Tensor | None = None
        self.skipped: torch.Tensor | None = None
        self._skipped_updates = 0
        self._deferred_skip: DeferredFlag | None = (
            None  # whether the last update was skipped, if only the device knows
        )
        broadcast_training_state(model, self, loss_scaler)
        self._ensure_layout()
        self._wrap(optimizer)

    @property
    def skipped_updates(self) -> int:
        """How many updates have been skipped; of one on a GPU that is not finished this waits for it."""
        self._record_deferred_skip()
        return self._skipped_updates

    @skipped_updates.setter
    def skipped_updates(self, count: int) -> None:
        self._record_deferred_skip()
        self._skipped_updates = count

    # What a training loop calls.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, except between micro-batches of one update, where it keeps them.

        Raises:
            RuntimeError: after backward() and before step(), while reductions are under way.
        """
        if self._micro_batches:
            return
        if self._in_flight():
            raise RuntimeError("zero_grad() between backward() and step() would clear gradients in flight")
        self._pending_grad_scale = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Counts a micro-batch; on every `accumulate`-th averages, unscales, clips and updates.

        The mean, the loss scale and clipping are one grad_scale inside the update: `p.grad` is what the
        reduction left, unless `synchronize` was called.

        Args:
            closure: recomputes the loss and its gradients; on one rank only.

        Raises:
            RuntimeError: a closure on several ranks or with accumulation (its backward would run after the
                reductions); a gradient for a parameter that was frozen when `distribute` was called; a
                GradScaler that calls step() itself.
        """
        loss = self._evaluate(closure)
        self._micro_batches += 1
        if self._micro_batches < self._accumulate:
            return loss
        if self._adasum:
            self._refuse_unhooked()
            self._wrapper.step()
        else:
            self._reduce()
            self._update_scaled()
        self._micro_batches, self._pending_grad_scale = 0, None
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Waits for the reductions and makes `p.grad` the unscaled mean over ranks and micro-batches.

        `step` needs no such call; make it, after the last backward() of an update, to look at the averaged
        gradient or to change it before `step`. Parameters that no rank has a gradient for keep None.
        """
        if self._adasum:
            raise RuntimeError("adasum combines updates, not gradients: there is no averaged gradient to wait for")
        self._reduce()
        if isinstance(self._pending_grad_scale, torch.Tensor) or self._pending_grad_scale != 1.0:
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, self._pending_grad_scale)
            self._pending_grad_scale = 1.0

    def broadcast(self) -> None:
        """Gives every rank rank 0's parameters, buffers, state and hyper-parameters; all ranks call it.

        `distribute` has done so; call it again after a `load_state_dict` on rank 0 alone.
        """
        self._record_deferred_skip()
        broadcast_training_state(self._model, self, self._loss_scaler)

    # What an optimizer has besides.

    def state_dict(self) -> dict[str, Any]:
        """As `Adam.state_dict`."""
        self._record_deferred_skip()
        return super().state_dict()

    def state_dict_on_root(self) -> dict[str, Any] | None:
        """`state_dict` on rank 0, None on the others; every rank must call it where the state is sharded."""
        return self.state_dict() if self._hvd.rank() == ROOT else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Adam.load_state_dict`, on this rank; `broadcast` gives it to the others."""
        if self._in_flight():
            raise RuntimeError("load_state_dict() between backward() and step() would mix two states")
        self._record_deferred_skip()  # of the state of before
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train; all ranks call it. They become rank 0's and are reduced like the others."""
        if self._wrapper is None:  # the constructor of torch.optim.Optimizer: the state exists already
            PlainOptimizer.add_param_group(self, param_group)
            return
        super().add_param_group(param_group)
        self._share()
        self.broadcast()
        if not self._single_rank:
            self._hook([p for p in self.param_groups[-1]["params"] if p.requires_grad])
            self._ensure_layout()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a distributed optimizer is tied to its process; copy or save its state_dict() instead")

    # Whether each gradient is reduced to its owner only.
    scatters = False

    # GradScaler.step would unscale gradients in flight; it leaves that to an optimizer with this attribute.
    _step_supports_amp_scaling = True

    # One update.

    def _reduce(self) -> None:
        """Completes and awaits the sum of every gradient over the ranks, unless that has been done."""
        if self._pending_grad_scale is not None:
            return
        self._record_deferred_skip()  # by now the device has more to do than what is asked for
        self._ensure_layout()
        if self._single_rank:
            grad_scale = 1 / self._accumulate
            if self._sums:
                self._sum = self._sum_of_all()
        else:
            self._refuse_unhooked()
            self._sum = self._reducer.finish(add=self._sums)
            grad_scale = self._reducer.mean_scale
            self._rearm()
        if self._loss_scaler is not None:
            scale = self._loss_scaler._get_scale_async()  # get_scale() would wait for the device
            grad_scale = grad_scale / (self._loss_scaler.get_scale() if scale is None else scale.double())
        self._pending_grad_scale = grad_scale

    def _sum_of_all(self) -> torch.Tensor | None:
        """The sum of all elements of the gradients of one rank: finite if they are."""
        spans = [(flat, span) for flat in self._storages for span in flat.spans(flat.collect())]
        sums = [sum_of(flat.grad[start:end]) for flat, (start, end) in spans]
        sums += [sum_of(p.grad) for p in self._unflattened if p.grad is not None]
        return torch.stack([value.to(sums[0].device) for value in sums]).sum() if sums else None

    def _update_scaled(self) -> None:
        """Folds mean, loss scale and clipping into `grad_scale`, and updates, unless one is not finite."""
        if all(p.grad is None for p in self._parameters()):
            return
        grad_scale, finite_probe = self._pending_grad_scale, self._sum
        if self._max_grad_norm is not None or self._loss_scaler is not None:
            finite_probe = self._norm() * grad_scale
        looks = self._loss_scaler is not None or self._skip_nonfinite
        self.skipped = ~finite_probe.isfinite() if looks else None
        if self._loss_scaler is not None:
            self._update_scale(self.skipped)
        late = looks and self._only_the_device_knows()
        if looks and not late and self.skipped:
            self._skipped_updates += 1
            return
        if self._max_grad_norm is not None:
            self.grad_norm = finite_probe
            # As torch.nn.utils.clip_grad_norm_ has it, 1e-6 included.
            grad_scale = grad_scale * (self._max_grad_norm / (finite_probe + 1e-6)).clamp(max=1.0)
        if late:
            grad_scale = (
                grad_scale + finite_probe * 0
            )  # NaN if the finite_probe is infinite or NaN: the kernel then changes nothing
        if isinstance(grad_scale, float):
            grad_scale = None if grad_scale == 1 else torch.tensor(grad_scale, dtype=torch.float64)
        self._grad_scale = grad_scale
        with self._wrapper.skip_synchronize():
            self._wrapper.step()  # comes back to _update, below whatever a subclass of Adam does in its step
        if late:
            self._deferred_skip = DeferredFlag(self.skipped)

    def _only_the_device_knows(self) -> bool:
        """Whether to leave it to the kernel to skip the update, so that the host need not wait to be told."""
        fused = all(implementation == "fused" for implementation in self._implementations)
        return backend(self.skipped.device.type).skips_nan and fused and not self._unflattened

    def _record_deferred_skip(self) -> None:
        """Takes note of a skipped update that only the device has known of."""
        late, self._deferred_skip = self._deferred_skip, None
        if late is not None and late.read():
            self._skipped_updates += 1
            for flat in self._storages:
                flat.undo_step_counts()

    def _update_scale(self, skips: torch.Tensor) -> None:
        """Tells the scaler what `unscale_` would note, after a pass over the gradients that the norm has made."""
        found = {skips.device: skips.float()}
        self._loss_scaler._per_optimizer_states[id(self)]["found_inf_per_device"] = found
        self._loss_scaler.update()

    def _norm(self) -> torch.Tensor:
        """The 2-norm of all gradients as they are."""
        norms = torch._foreach_norm([x for p in self._parameters() if p.grad is not None for x in pieces(p.grad)])
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def _evaluate(self, closure: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
        if hasattr(self, "found_inf"):
            raise RuntimeError("give the GradScaler to distribute(loss_scaler=…) and call optimizer.step() itself")
        if closure is None:
            return None
        if not self._single_rank or self._accumulate > 1:
            raise RuntimeError("step(closure) works on one rank without accumulation only; call step() instead")
        with torch.enable_grad():
            return closure()

    def _refuse_unhooked(self) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None and parameter not in self._hooked:
                raise RuntimeError(
                    f"{self._names()[parameter]} has a gradient but was frozen when distribute() was called, so "
                    "it would not be averaged; freeze it again, or call distribute() after unfreezing"
                )

    # Storage.

    def _make_storage(self, params: list[torch.Tensor], groups: list[int]) -> FlatStorage:
        layout = Layout.of(params, BUCKET_BYTES if self._always_flat else None)
        return FlatStorage(params, groups, self.state, layout)

    def _build_layout(self) -> None:
        self._record_deferred_skip()  # while the buffers are those of the last step
        super()._build_layout()
        if not self._always_flat:
            return
        for p in self._unflattened:
            if p.requires_grad:
                raise UserError(
                    f"{self._names()[p]} shares memory with another parameter, or is no ordinary tensor, and "
                    "cannot be averaged: tie parameters by using one and the same"
                )
        prefix = collective_prefix()
        self._reducer = Reducer(self._storages, prefix, self._compression, self._accumulate, self.scatters)
        if self._wrapper is not None:
            self._wrapper._p_to_group = {p: group for group in self._reducer.groups for p in group}
            self._wrapper._group_counts = dict.fromkeys(self._reducer.groups, 0)

    def _compile_error(self, resolved: list[str]) -> str | None:
        """The same on all ranks: if one cannot compile, none must, or the ranks would drift apart."""
        problems = [super()._compile_error(resolved)]
        if not self._single_rank:
            problems = self._hvd.allgather_object(problems[0], name="hvd_adam.kernels")
        return next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), None)

    def _warn_unfused(self, problem: str) -> None:
        if self._hvd.rank() == 0:
            super()._warn_unfused(problem)

    # How Horovod's wrapper is driven.

    def _wrap(self, optimizer: Adam) -> None:
        self._hooked = {p: None for p in self._parameters() if p.requires_grad}  # an ordered set
        names, prefix = self._names(), self._prefix
        with elastic_disabled():  # where Horovod would reduce on one rank too
            self._wrapper = self._hvd.DistributedOptimizer(
                optimizer,
                named_parameters=[(f"{prefix}.{names[p]}", p) for p in self._parameters()],
                compression=AdasumWire(self._compression),
                backward_passes_per_step=self._accumulate,
                op=self._hvd.Adasum if self._adasum else self._hvd.Sum,
                groups=[list(group) for group in self._reducer.groups] if self._reducer else None,
            )
        self._share()
        if self._adasum:
            self._take_over_adasum()
        else:
            self._wrapper._grouped_allreduce_grad_async = self._send
            self._wrapper._update = lambda: self._update(self._grad_scale)

    def _share(self) -> None:
        """One set of groups and state: the wrapper's constructor and loading have made copies."""
        self._wrapper.param_groups, self._wrapper.state = self.param_groups, self.state
        self._wrapper.defaults = self.defaults

    @torch.no_grad()
    def _send(self, group: tuple[torch.Tensor, ...]) -> tuple[None, None]:
        """Called by the wrapper's hooks when a bucket's gradients are there."""
        reducer = self._reducer
        if not reducer.under_way:
            self._ensure_layout()
        if self._reducer is reducer:
            self._reducer.send(group[0])
        # else the buckets are others now, and this one's may not be complete: finish() sends what is left.
        return None, None

    def _in_flight(self) -> bool:
        return bool(self._wrapper._handles) or (self._reducer is not None and self._reducer.under_way)

    def _rearm(self) -> None:
        """Makes the wrapper's hooks ready for the next update."""
        wrapper = self._wrapper
        wrapper._handles.clear()
        wrapper._group_counts = dict.fromkeys(wrapper._group_counts, 0)
        wrapper._allreduce_delay = dict.fromkeys(wrapper._allreduce_delay, self._accumulate)

    def _take_over_adasum(self) -> None:
        """The wrapper steps each parameter by itself, on the sum over micro-batches: make it the mean."""
        combine = self._wrapper._allreduce_grad_async

        def step_and_combine(parameter: torch.nn.Parameter) -> tuple:
            if parameter.grad is not None:
                parameter.grad.div_(self._accumulate)
            return combine(parameter)

        self._wrapper._allreduce_grad_async = step_and_combine
        # It steps one parameter at a time: moving each into a flat buffer of its own would gain nothing.
        self._wrapper._resolve_implementations = lambda: ["foreach"] * len(self.param_groups)
        # Its constructor fills in zero gradients, on which parameters that are not used would be stepped.
        super().zero_grad()

    @torch.enable_grad()
    def _hook(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Does for parameters that came later what the wrapper's constructor did for the first."""
        wrapper, names, prefix = self._wrapper, self._names(), collective_prefix()
        for parameter in parameters:
            self._hooked[parameter] = None
            wrapper._parameter_names[parameter] = f"{prefix}.{names[parameter]}"
            wrapper._allreduce_delay[parameter] = self._accumulate
            wrapper._requires_update.add(parameter)
            if self._adasum:
                wrapper._starting_models[parameter] = torch.zeros_like(parameter, requires_grad=False)
            accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            accumulator.register_hook(wrapper._make_hook(parameter))
            wrapper._grad_accs.append(accumulator)

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> dict[torch.nn.Parameter, str]:
        """A name for every parameter, alike on all ranks: the model's where it has one."""
        names = {
            p: f"param_groups.{i}.{j}"
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
        }
        return names | {p: name for name, p in self._model.named_parameters() if p in names}


def pieces(gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The elements of a tensor, in pieces whose norms do not lose precision."""
    return gradient.reshape(-1).split(_NORM_ELEMENTS)
