"""`DistributedAdam`: drives `hvd.DistributedOptimizer`, with what that wrapper gets wrong put right.

The wrapper makes the optimizer anew (losing its state), sums over accumulated micro-batches, cannot clip or
unscale before it averages, steps parameters that no rank has a gradient for, fires step hooks twice, and lets
sums depend on timing. None of this reaches the user.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvd_adam.adam import Adam
from hvd_adam.broadcast import broadcast_training
from hvd_adam.cluster import horovod
from hvd_adam.wire import Bfloat16Mean, Wire

# Gradients are reduced in buckets fixed in advance, so that sums do not depend on timing. Large enough to
# use the network's bandwidth, small enough that the first leaves while backward still runs: of 1 to 64 MiB, 4
# and 8 were the fastest for a 10.5 M parameter MLP and for ResNet-18 on two ranks of a two-core CPU.
BUCKET_BYTES = 8 * 2**20

# Keeps the collectives of several distributed optimizers apart; counted alike on all ranks.
_numbers = itertools.count()


class DistributedAdam(Adam):
    """What `distribute` returns: an `Adam` whose `step` first averages the gradients over all ranks.

    It owns parameter groups and state; `hvd.DistributedOptimizer`, inside, shares them, reduces the gradients
    from its backward hooks and makes the update.

    Attributes:
        grad_norm: global 2-norm of the last averaged gradient before clipping, a 0-dim tensor; None without
            `max_grad_norm`.
        skipped_updates: how many updates the loss scaler has skipped, on all ranks alike, because a gradient was
            not finite.
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
    ) -> None:
        self._wrapper: Any = None
        # Not Adam's constructor: parameters, state and hyper-parameters are those of the optimizer given.
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        for name, hooks in vars(optimizer).items():
            if name.startswith("_optimizer_") and name.endswith("_hooks"):
                setattr(self, name, hooks)  # what was registered before is called from now on by this one
        self._hvd = horovod()
        self._number = next(_numbers)
        self._model = model
        self._accumulate = accumulate
        self._op = op
        self._max_grad_norm = max_grad_norm
        self._loss_scaler = loss_scaler
        self._micro_batches = 0
        self._synchronized = False
        self._bf16 = compression == "bf16"
        self._pending: list[Bfloat16Mean] = []
        self.grad_norm: torch.Tensor | None = None
        self.skipped_updates = 0
        # fp16 gradients are divided before they travel, for the sum to stay in range; the others afterwards.
        self._divided_on_the_way = compression == "fp16" and self._hvd.size() > 1
        self._wrap(optimizer, compression)

    # What a training loop calls.

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, except between micro-batches of one update, where it keeps them.

        Raises:
            RuntimeError: after backward() and before step(), while reductions are under way.
        """
        if self._micro_batches:
            return
        if self._wrapper._handles:
            raise RuntimeError("zero_grad() between backward() and step() would clear gradients in flight")
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Counts a micro-batch; on every `accumulate`-th averages, unscales, clips and updates.

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
        if self._hvd.size() > 1:
            self._refuse_strangers()
        if self._op == "adasum" and self._hvd.size() > 1:
            self._wrapper.step()
        else:
            self.synchronize()
            self._clip()
            self._update()
        self._micro_batches, self._synchronized = 0, False
        return loss

    @torch.no_grad()
    def synchronize(self) -> None:
        """Waits for the reductions: `p.grad` is then the unscaled mean over ranks and micro-batches.

        `step` calls it; call it yourself, after the last backward() of an update, to look at the averaged
        gradient or to change it before `step`. Parameters that no rank has a gradient for keep None.
        """
        if self._synchronized:
            return
        if self._op == "adasum" and self._hvd.size() > 1:
            raise RuntimeError("adasum combines updates, not gradients: there is no averaged gradient to wait for")
        if self._hvd.size() > 1:
            self._reduce()
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if self._accumulate > 1 and gradients and not self._divided_on_the_way:
            torch._foreach_mul_(gradients, 1.0 / self._accumulate)
        if self._loss_scaler is not None and gradients:  # it cannot do without any
            self._loss_scaler.unscale_(self._wrapper)
        self._synchronized = True

    def broadcast(self) -> None:
        """Gives every rank rank 0's parameters, buffers, state and hyper-parameters; all ranks call it.

        `distribute` has done so; call it again after a `load_state_dict` on rank 0 alone.
        """
        broadcast_training(self._model, self, self._loss_scaler)

    # What an optimizer has besides.

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Adam.load_state_dict`, on this rank; `broadcast` gives it to the others."""
        if self._wrapper._handles:
            raise RuntimeError("load_state_dict() between backward() and step() would mix two states")
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train; all ranks call it. They become rank 0's and are reduced like the others."""
        if self._wrapper is None:  # the constructor of torch.optim.Optimizer: the state exists already
            torch.optim.Optimizer.add_param_group(self, param_group)
            return
        super().add_param_group(param_group)
        self._share()
        if self._hvd.size() > 1:
            self._hook([p for p in self.param_groups[-1]["params"] if p.requires_grad])
        self.broadcast()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a distributed optimizer is tied to its process; copy or save its state_dict() instead")

    # GradScaler.step would unscale gradients in flight; it leaves that to an optimizer with this attribute.
    _step_supports_amp_scaling = True

    # How Horovod's wrapper is driven.

    def _wrap(self, optimizer: Adam, compression: str) -> None:
        hvd, adasum = self._hvd, self._op == "adasum"
        self._hooked = {p: None for p in self._parameters() if p.requires_grad}  # an ordered set
        names = self._names()
        self._wrapper = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=[(f"hvd_adam.{self._number}.{names[p]}", p) for p in self._parameters()],
            compression=Wire(compression, divisor=1 if adasum else hvd.size() * self._accumulate),
            backward_passes_per_step=self._accumulate,
            op=hvd.Adasum if adasum else hvd.Sum if compression == "fp16" else hvd.Average,
            groups=None if adasum or self._bf16 else _buckets(self._hooked),
        )
        self._share()
        if adasum and hvd.size() > 1:
            self._take_over_adasum()
        elif self._bf16:
            self._wrapper._allreduce_grad_async = self._start_bf16

    def _share(self) -> None:
        """One set of groups and state: the wrapper's constructor and loading have made copies."""
        self._wrapper.param_groups, self._wrapper.state = self.param_groups, self.state
        self._wrapper.defaults = self.defaults

    def _refuse_strangers(self) -> None:
        for parameter in self._parameters():
            if parameter.grad is not None and parameter not in self._hooked:
                raise RuntimeError(
                    f"{self._names()[parameter]} has a gradient but was frozen when distribute() was called, so "
                    "it would not be averaged; freeze it again, or call distribute() after unfreezing"
                )

    def _reduce(self) -> None:
        """Completes and awaits the mean of every gradient over the ranks."""
        used = torch.tensor([p.grad is not None for p in self._hooked], dtype=torch.int32)
        handle = self._hvd.allreduce_async_(used, op=self._hvd.Sum, name=f"hvd_adam.{self._number}.used")
        self._complete_hooks()
        for pending in self._pending:
            pending.share()
        self._wrapper.synchronize()
        self._pending.clear()
        for parameter, ranks in zip(self._hooked, self._hvd.synchronize(handle).tolist(), strict=True):
            if ranks == 0:  # torch skips a parameter without a gradient: so does the average of none
                parameter.grad = None

    def _start_bf16(self, parameter: torch.nn.Parameter) -> tuple[Bfloat16Mean, tuple]:
        wire, context = self._wrapper._compression.compress(parameter.grad)
        self._pending.append(Bfloat16Mean(wire, self._wrapper._parameter_names[parameter]))
        return self._pending[-1], context

    def _complete_hooks(self) -> None:
        """Submits what this rank's backward left out: the other ranks may have it, and all must take part."""
        wrapper = self._wrapper
        for parameter in self._hooked:
            if wrapper._allreduce_delay[parameter] > 0:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                wrapper._allreduce_delay[parameter] = 1
                wrapper._make_hook(parameter)()

    def _take_over_adasum(self) -> None:
        """The wrapper steps each parameter by itself, on the sum over micro-batches: make it the mean."""
        combine = self._wrapper._allreduce_grad_async

        def step_and_combine(parameter: torch.nn.Parameter) -> tuple:
            if parameter.grad is not None:
                parameter.grad.div_(self._accumulate)
            return combine(parameter)

        self._wrapper._allreduce_grad_async = step_and_combine
        # Its constructor fills in zero gradients, on which parameters that are not used would be stepped.
        super().zero_grad()

    @torch.enable_grad()
    def _hook(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Does for parameters that came later what the wrapper's constructor did for the first."""
        wrapper, names = self._wrapper, self._names()
        for parameter in parameters:
            self._hooked[parameter] = None
            wrapper._parameter_names[parameter] = f"hvd_adam.{self._number}.{names[parameter]}"
            wrapper._allreduce_delay[parameter] = self._accumulate
            wrapper._requires_update.add(parameter)
            if self._op == "adasum":
                wrapper._starting_models[parameter] = torch.zeros_like(parameter, requires_grad=False)
            elif wrapper._groups is not None:
                wrapper._p_to_group[parameter] = (parameter,)
                wrapper._group_counts[(parameter,)] = 0
            accumulator = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
            accumulator.register_hook(wrapper._make_hook(parameter))
            wrapper._grad_accs.append(accumulator)

    def _evaluate(self, closure: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
        if hasattr(self, "found_inf"):
            raise RuntimeError("give the GradScaler to distribute(loss_scaler=…) and call optimizer.step() itself")
        if closure is None:
            return None
        if self._hvd.size() > 1 or self._accumulate > 1:
            raise RuntimeError("step(closure) works on one rank without accumulation only; call step() instead")
        with torch.enable_grad():
            return closure()

    def _clip(self) -> None:
        if self._max_grad_norm is not None:
            gradients = [p for p in self._parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(gradients, self._max_grad_norm)

    def _update(self) -> None:
        with self._wrapper.skip_synchronize():
            if self._loss_scaler is None or all(p.grad is None for p in self._parameters()):
                self._wrapper.step()
                return
            scale = self._loss_scaler.get_scale()
            self._loss_scaler.step(self._wrapper)
            self._loss_scaler.update()
            self.skipped_updates += self._loss_scaler.get_scale() < scale

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


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Neighbours of one dtype, last layers first (the order in which backward yields gradients)."""
    buckets: list[list[torch.nn.Parameter]] = []
    filled = 0
    for parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.element_size()
        if not buckets or filled + size > BUCKET_BYTES or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += size
    return buckets
