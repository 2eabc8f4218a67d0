"""Adam and AdamW as a ``torch.optim.Optimizer`` written from the papers' formulas."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_adam.adam_reference import adam_update

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[Group] | Iterable[tuple[str, Tensor]]

_ALWAYS_KEPT = ("step", "exp_avg", "exp_avg_sq")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

# On a CPU a batch that stays in cache makes a step of 11 M parameters take 20 ms instead of 42 ms, and no
# whole-model temporary is paged in. A GPU wants few launches, so there a batch may be as large as it likes.
_CPU_BATCH_ELEMENTS = 1 << 18


@dataclass
class _Batch:
    """Tensors of one parameter group that share device and dtype, one entry a parameter in each list."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)  # stays empty without AMSGrad
    steps: list[Tensor] = field(default_factory=list)
    elements: int = 0

    def has_room_for(self, p: Tensor) -> bool:
        return not p.is_cpu or self.elements + p.numel() <= _CPU_BATCH_ELEMENTS

    def append(self, p: Tensor, state: dict[str, Tensor], amsgrad: bool) -> None:
        self.params.append(p)
        self.grads.append(p.grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        if amsgrad:
            self.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        self.steps.append(state["step"])
        self.elements += p.numel()


def _update_reference(batch: _Batch, group: Group) -> None:
    """Update one tensor after the other by the oracle, in float64."""
    beta1, beta2 = group["betas"]
    maxima = batch.max_exp_avg_sqs or [None] * len(batch.params)
    columns = (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, maxima, batch.steps)
    for theta, g, m, v, v_max, step in zip(*columns, strict=True):
        adam_update(
            theta,
            g,
            m,
            v,
            v_max,
            t=step.item(),
            alpha=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            epsilon=group["eps"],
            lambda_=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )


def _update_foreach(batch: _Batch, group: Group) -> None:
    """Update all tensors together, in their own dtype.

    The order of operations is the usual one of the plain formulas in PyTorch, so that results agree with
    ``torch.optim.Adam`` to the last bit wherever the same kernels run. Temporaries: one copy of the
    batch's parameters for the denominator, and one more each for ``maximize`` and coupled weight decay.
    """
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    beta1, beta2 = group["betas"]
    steps = [step.item() for step in batch.steps]

    grads = torch._foreach_neg(batch.grads) if group["maximize"] else batch.grads
    if weight_decay != 0:
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(batch.params, 1 - lr * weight_decay)
        else:
            grads = torch._foreach_add(grads, batch.params, alpha=weight_decay)

    torch._foreach_lerp_(batch.exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(batch.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(batch.exp_avg_sqs, grads, grads, 1 - beta2)
    second_moments = batch.exp_avg_sqs
    if group["amsgrad"]:
        torch._foreach_maximum_(batch.max_exp_avg_sqs, batch.exp_avg_sqs)
        second_moments = batch.max_exp_avg_sqs

    denominators = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in steps])
    torch._foreach_add_(denominators, group["eps"])
    step_sizes = [-(lr / (1 - beta1**t)) for t in steps]
    torch._foreach_addcdiv_(batch.params, batch.exp_avgs, denominators, step_sizes)


_UPDATES: dict[str, Callable[[_Batch, Group], None]] = {
    "reference": _update_reference,
    "foreach": _update_foreach,
    "auto": _update_foreach,
}


class Adam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) that takes what ``torch.optim.Adam`` takes.

    With ``decoupled_weight_decay`` it is AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), with
    ``amsgrad`` AMSGrad (Reddi, Kale & Kumar 2018, algorithm 2). State is kept in each parameter's own
    dtype, half precision included, as PyTorch does: two tensors of the parameter's size (three with
    ``amsgrad``) and a step count, all of them there from construction on for every parameter that requires
    a gradient. A step takes O(n) time for n elements. Every hyper-parameter lives in the parameter groups,
    where it may be changed between steps. ``state_dict`` goes to and from ``torch.optim.Adam`` and
    ``AdamW``. The step count is a float32 and exact up to 2**24 steps, where every bias correction has long
    been 1.

    Args:
        params: parameters, or dictionaries of groups, or (name, parameter) pairs where PyTorch takes them.
            Real floating point, dense, on any mixture of devices and dtypes.
        lr: learning rate α, at least 0. A 1-element tensor is read anew on every step; on a GPU each read
            waits for the device.
        betas: decay rates of the moments, floats in [0, 1).
        eps: ε, outside the root, at least 0. In float16 everything below 6e-8 is 0, the default too.
        weight_decay: λ, at least 0.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: shrink the parameters by lr · weight_decay instead of adding
            weight_decay · parameter to the gradient.
        maximize: ascend instead of descending.
        implementation: "reference" is the paper line by line in float64, "foreach" the multi-tensor form in
            the parameters' dtype, "auto" the fastest of this version, which is "foreach".

    Raises:
        ValueError: a hyper-parameter out of range, a complex or sparse parameter, an unknown implementation.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        implementation: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "implementation": implementation,
        }
        _check_hyper_parameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters and make their state; missing options take the constructor's values.

        Raises:
            ValueError: as the constructor does; the optimizer is then as it was.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyper_parameters(group)
            _check_parameters(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._make_missing_state(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient and return the closure's loss, if there is a closure.

        Parameters without a gradient are left wholly alone: no decay, no step count.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype; nothing has then been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [(batch, group) for group in self.param_groups for batch in self._batches(group)]
        for batch, group in batches:
            torch._foreach_add_(batch.steps, 1)
            _UPDATES[group["implementation"]](batch, group)
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of a pickle, or what ``load_state_dict`` has made of a state dictionary.

        A loaded state is checked before anything is changed, copied (PyTorch would share the tensors with
        their source), and completed: options that its groups lack keep this optimizer's values, and
        parameters without state get zeros. Options of other optimizers are kept but have no effect.

        Raises:
            ValueError: the loaded state is not Adam's or does not fit the parameters.
        """
        own_groups = self.__dict__.get("param_groups")
        if own_groups is None:  # unpickling or copying: the state is this class's own, and whole
            super().__setstate__(state)
            return
        for own, loaded in zip(own_groups, state["param_groups"], strict=True):
            for option in self.defaults.keys() & own.keys():
                loaded.setdefault(option, own[option])
            loaded["betas"] = tuple(map(float, loaded["betas"]))  # PyTorch's may be tensors
            _check_implementation(loaded["implementation"])
        _check_loaded_state(state)
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                if self.state.get(p):
                    self.state[p] = _copied_state(p, self.state[p])
            self._make_missing_state(group)

    def _make_missing_state(self, group: Group) -> None:
        for p in group["params"]:
            if p.requires_grad:
                self._whole_state(p, group["amsgrad"])

    def _whole_state(self, p: Tensor, amsgrad: bool) -> dict[str, Tensor]:
        """Return the state of ``p``, with zeros for what is not there yet."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _batches(self, group: Group) -> list[_Batch]:
        """Sort the group's parameters that have gradients by device and dtype."""
        batches: list[_Batch] = []
        newest: dict[tuple[torch.device, torch.dtype], _Batch] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            _check_gradient(p)
            batch = newest.get((p.device, p.dtype))
            if batch is None or not batch.has_room_for(p):
                batch = newest[p.device, p.dtype] = _Batch()
                batches.append(batch)
            batch.append(p, self._whole_state(p, group["amsgrad"]), group["amsgrad"])
        return batches


def _check_hyper_parameters(group: Group) -> None:
    """Refuse what ``torch.optim.Adam`` refuses."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but has {lr.numel()} elements")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if len(betas) != 2 or not all(isinstance(beta, float) for beta in betas):
        raise ValueError(f"betas must be two floats, but got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    _check_implementation(group["implementation"])


def _check_implementation(implementation: object) -> None:
    if implementation not in _UPDATES:
        choices = ", ".join(repr(name) for name in _UPDATES)
        raise ValueError(
            f"implementation={implementation!r} is not available in this version, choose one of {choices}"
        )


def _check_parameters(params: list[Tensor]) -> None:
    for i, p in enumerate(params):
        if p.layout != torch.strided:
            raise ValueError(f"Adam does not support sparse parameters, but parameter {i} is {p.layout}")
        if p.is_complex():
            raise ValueError(f"Adam does not support complex parameters, but parameter {i} is {p.dtype}")


def _check_gradient(p: Tensor) -> None:
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider torch.optim.SparseAdam instead"
        )
    if p.grad.dtype != p.dtype:
        raise RuntimeError(f"Adam needs gradients of the parameter's {p.dtype}, but got {p.grad.dtype}")


def _check_loaded_state(state: dict[str, Any]) -> None:
    """Refuse state that is not Adam's or does not fit; PyTorch itself would take it and fail later."""
    params = [p for group in state["param_groups"] for p in group["params"]]
    for i, p in enumerate(params):
        loaded = state["state"].get(p)
        if not loaded:
            continue
        missing = [key for key in _ALWAYS_KEPT if key not in loaded]
        if missing:
            raise ValueError(f"loaded state of parameter {i} is not Adam's: {missing[0]} is missing")
        for key in _MOMENTS:
            if key in loaded and loaded[key].shape != p.shape:
                raise ValueError(
                    f"loaded {key} of parameter {i} has shape {tuple(loaded[key].shape)}, "
                    f"but the parameter has shape {tuple(p.shape)}"
                )
        step = torch.as_tensor(loaded["step"])
        if step.numel() != 1 or not step.item() >= 0:
            raise ValueError(f"loaded step of parameter {i} must be one count of at least 0, but is {step}")


def _copied_state(p: Tensor, loaded: dict[str, Any]) -> dict[str, Tensor]:
    """Copy a loaded state into tensors laid out like ``p``, its step count to the CPU wherever it lay."""
    state = {"step": torch.tensor(float(loaded["step"]), dtype=torch.float32, device="cpu")}
    for key in _MOMENTS:
        if key in loaded:
            state[key] = torch.empty_like(p, memory_format=torch.preserve_format).copy_(loaded[key])
    return state
