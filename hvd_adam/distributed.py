"""The default strategy: Adam wrapped in `hvd.DistributedOptimizer`, with what the wrapper gets wrong put right.

    optimizer = distribute(Adam(model.parameters(), lr=1e-3), model)
    for images, labels in batches:
        optimizer.zero_grad()
        loss_function(model(images), labels).backward()   # reductions start while backward still runs
        optimizer.step()                                   # waits for them, then updates

Horovod's wrapper makes the optimizer anew (losing its state), fakes a step to broadcast state, sums over
accumulated micro-batches, cannot clip or unscale before it averages, steps parameters that no rank has a
gradient for, and fires step hooks twice. `DistributedAdam` drives it so that none of this reaches the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hvd_adam.adam import Adam
from hvd_adam.broadcast import broadcast_training
from hvd_adam.cluster import horovod
from hvd_adam.errors import UserError
from hvd_adam.wire import COMPRESSIONS, Bfloat16Mean, Wire

STRATEGIES = ("allreduce",)
OPS = ("average", "adasum")

# Gradients are reduced in buckets fixed in advance, so that sums do not depend on timing. Large enough to
# use the network's bandwidth, small enough that the first leaves while backward still runs.
BUCKET_BYTES = 8 * 2**20


def distribute(
    optimizer: Adam,
    model: torch.nn.Module,
    *,
    strategy: str = "allreduce",
    accumulate: int = 1,
    compression: str = "none",
    op: str = "average",
    max_grad_norm: float | None = None,
    loss_scaler: Any | None = None,
) -> DistributedAdam:
    """Makes N ranks train as one: every rank calls it once with its own copy of the same model.

    Afterwards parameters, buffers, optimizer state and hyper-parameters are bit for bit rank 0's on every
    rank, and rank 0's are what they were. N ranks with batch b then make the update that one rank makes
    with batch N·b, up to float rounding. Use what is returned in place of `optimizer`.

    Args:
        optimizer: the `Adam` of this process, fresh or with state (on rank 0 alone is enough).
        model: the model whose parameters it updates, on its final device.
        strategy: "allreduce" (`hvd.DistributedOptimizer`).
        accumulate: micro-batches to one update, ≥ 1. Call `step()` after each: it acts on every k-th, with
            the mean of the k gradients; `zero_grad()` in between keeps what has been accumulated.
        compression: what the gradients travel as: "none" (as they are), "fp16", "bf16".
        op: "average", or "adasum" (Maleki et al. 2020, arXiv 2006.02924), which combines the ranks' own Adam
            steps; it needs MPI and a power of two of ranks, and neither clips nor scales losses.
        max_grad_norm: clips the averaged, unscaled gradient to this global 2-norm, > 0.
        loss_scaler: a `torch.amp.GradScaler`. Call `loss_scaler.scale(loss).backward()` and `step()`, nothing
            else: unscaling, skipping and updating the scale happen inside, alike on all ranks.

    Raises:
        UserError: an impossible option or combination; a model that differs from rank 0's; `init` not called.
        TypeError: the optimizer is not an `hvd_adam.Adam`.
    """
    if not isinstance(optimizer, Adam):
        raise TypeError(f"distribute takes an hvd_adam.Adam, not {type(optimizer).__name__}")
    if isinstance(optimizer, DistributedAdam):
        raise UserError("this optimizer is distributed already; call distribute once")
    hvd = horovod()
    if not hvd.is_initialized():
        raise UserError("call hvd_adam.init() before distribute()")
    _require_choice("strategy", strategy, STRATEGIES)
    _require_choice("compression", compression, COMPRESSIONS)
    _require_choice("op", op, OPS)
    if accumulate < 1 or accumulate != int(accumulate):
        raise UserError(f"accumulate is {accumulate}; it must be a whole number ≥ 1")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise UserError(f"max_grad_norm is {max_grad_norm}; it must be > 0")
    if op == "adasum":
        _require_adasum(compression, max_grad_norm, loss_scaler)
    _require_one_device(model, optimizer)
    distributed = DistributedAdam(
        optimizer,
        model,
        accumulate=int(accumulate),
        compression=compression,
        op=op,
        max_grad_norm=max_grad_norm,
        loss_scaler=loss_scaler,
    )
    distributed.broadcast()
    return distributed


class DistributedAdam(Adam):
    """What `distribute` returns: an `Adam` whose `step` first averages the gradients over all ranks.

    It owns parameter groups and state; `hvd.DistributedOptimizer`, inside, shares them, reduces the gradients
    from its backward hooks and makes the update.

    Attributes:
        grad_norm: global 2-norm of the last averaged gradient before clipping, a 0-dim tensor; None without
            `max_grad_norm`.
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
        self._hvd = horovod()
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
        if self._accumulate > 1 and gradients:
            torch._foreach_mul_(gradients, 1.0 / self._accumulate)
        if self._loss_scaler is not None:
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
            named_parameters=[(names[p], p) for p in self._parameters()],
            compression=Wire(compression, divisor=1 if adasum else hvd.size()),
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

    def _reduce(self) -> None:
        """Completes and awaits the mean of every gradient over the ranks."""
        stranger = next((p for p in self._parameters() if p.grad is not None and p not in self._hooked), None)
        if stranger is not None:
            raise RuntimeError(
                f"{self._names()[stranger]} has a gradient but was frozen when distribute() was called, so it "
                "would not be averaged; freeze it again, or call distribute() after unfreezing"
            )
        used = torch.tensor([p.grad is not None for p in self._hooked], dtype=torch.int32)
        handle = self._hvd.allreduce_async_(used, op=self._hvd.Sum, name="hvd_adam.used")
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
            wrapper._parameter_names[parameter] = names[parameter]
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
            if self._loss_scaler is None:
                self._wrapper.step()
            else:
                self._loss_scaler.step(self._wrapper)
                self._loss_scaler.update()

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


def _require_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _require_adasum(compression: str, max_grad_norm: float | None, loss_scaler: object) -> None:
    hvd = horovod()
    if max_grad_norm is not None or loss_scaler is not None:
        raise UserError("adasum combines the ranks' own steps: it cannot clip or unscale; use op=average")
    if compression == "bf16":
        raise UserError("adasum has no bf16 compression; use compression none or fp16")
    if hvd.size() > 1 and not hvd.mpi_enabled():
        raise UserError("adasum needs MPI; start the ranks with mpirun or horovodrun --mpi, or use op=average")
    if hvd.size() & (hvd.size() - 1):
        raise UserError(f"adasum needs a power of two of ranks, not {hvd.size()}; or use op=average")


def _require_one_device(model: torch.nn.Module, optimizer: Adam) -> None:
    parameters = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise UserError(
            f"the parameters are on several devices ({', '.join(devices)}); move the model to one, "
            "model.to(cluster.device), before Adam is built"
        )
