"""The fused update as one expression over 1-dimensional tensors: what the kernels of fused.py must compute.

Reading p, g, m, v and writing p, m, v once each is the least memory traffic that Adam can have: everything else of
a step (averaging, unscaling, clipping, weight decay, rounding) is computed in registers on the way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_adam.optim.formats.random_bits import round_stochastically, rounding_seed


@dataclass(frozen=True)
class KernelSpec:
    """What is compiled into a kernel. Everything else (tensors, hyper-parameters, step, grad_scale) is data.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of parameters and gradients.
        moment_dtype: of the moments.
        rounding: how half-precision parameters are stored: "nearest", "master" (float32 copies are updated),
            "stochastic", or "correction" (an 8-bit correction makes them more exact).
        state_format: how the moments are stored: "float32" (rounded to nearest), "bfloat16" (rounded
            stochastically) or "8bit" (as codes; `moment_dtype` is float32).
    """

    device: str
    dtype: torch.dtype
    moment_dtype: torch.dtype
    rounding: str
    state_format: str = "float32"

    @property
    def in_blocks(self) -> bool:
        """Whether the state is held in few bits, so that blocks of elements are updated together."""
        return self.state_format != "float32" or self.rounding == "correction"

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 parameters, float32 for all others."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def name(self) -> str:
        """A name for the spec that can be part of a file name."""
        values = astuple(self) if self.state_format != "float32" else astuple(self)[:-1]
        return "adam-" + "-".join(str(value).removeprefix("torch.") for value in values)


@dataclass
class Tensors:
    """The tensors of one parameter's update, of one shape; None if there is none."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master_param: Tensor | None = None


def decay_of(group: Mapping[str, Any]) -> str:
    """Returns "none", "coupled" (decay is added to the gradient) or "decoupled" (applied to the parameter)."""
    if group["weight_decay"] == 0:
        return "none"
    return "decoupled" if group["decoupled_weight_decay"] else "coupled"


class Scalars(NamedTuple):
    """The numbers of one update.

    Attributes:
        weight_decay: λ where it is coupled, −α·λ where it is decoupled.
        one_minus_beta1: 1−β₁.
        beta2: β₂.
        one_minus_beta2: 1−β₂.
        step_size: α·√c₂/c₁, see `scalars`.
        eps: ε·√c₂.
    """

    weight_decay: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    eps: float


def scalars(group: Mapping[str, Any], step: float) -> Scalars:
    """Returns the numbers of step number `step` ≥ 1 with the hyper-parameters of `group`.

    With c₁ = 1−β₁ᵗ and c₂ = 1−β₂ᵗ the update α·(m/c₁) / (√(v/c₂) + ε) is (α·√c₂/c₁)·m / (√v + ε·√c₂), the
    form at the end of section 2 of Kingma & Ba, arXiv 1412.6980, with their ε̂ = ε·√c₂.
    """
    beta1, beta2 = map(float, group["betas"])
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    root = math.sqrt(1 - beta2**step)
    return Scalars(
        weight_decay=-weight_decay * lr if group["decoupled_weight_decay"] else weight_decay,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        step_size=lr * root / (1 - beta1**step),
        eps=group["eps"] * root,
    )


def adam_expression(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    grad_scale: Tensor,
    scalars: Tensor,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns θ, m, v and the largest v after a step.

    Args:
        theta: parameters, of the dtype that the arithmetic is done in, like all tensors here.
        g: gradient.
        m: first moment.
        v: second moment.
        v_max: largest second moment; None without AMSGrad.
        grad_scale: multiplies the gradient first; 0-dimensional.
        scalars: the fields of `Scalars`, in order.
        decay: as `decay_of` returns it.
    """
    weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = scalars.unbind()
    g = g * grad_scale
    if decay == "coupled":
        g = g + weight_decay * theta
    elif decay == "decoupled":
        theta = theta + weight_decay * theta
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    if v_max is not None:
        v_max = torch.maximum(v_max, v)
    theta = theta - step_size * (m / ((v if v_max is None else v_max).sqrt() + eps))
    return theta, m, v, v_max


def current_master(p: Tensor, master: Tensor) -> Tensor:
    """Returns `master`, and `p` where it has changed since the last step (`load_state_dict`, `clamp_`, …).

    An element has changed if it is farther from its master than rounding explains; an infinity may be an overflow.
    """
    # Not `p == master.to(p.dtype)`: the compiler omits conversions to a dtype and back.
    info, wide = torch.finfo(p.dtype), p.to(master.dtype)
    rounding = info.eps / 2 * master.abs() + info.smallest_normal * info.eps
    kept = ((wide - master).abs() <= rounding) & master.isfinite() | wide.isinf()
    return torch.where(kept, master, wide)


def update_uncompiled(
    spec: KernelSpec,
    tensors: Tensors,
    grad_scale: Tensor | None,
    group: Mapping[str, Any],
    step: float,
    position: int,
) -> None:
    """Updates one parameter in place in PyTorch's own operations: the reference that kernels are compared with.

    Args:
        spec: fits the tensors.
        tensors: 1-dimensional.
        grad_scale: multiplies the gradient; 0-dimensional; None for 1.
        group: the hyper-parameters.
        step: number of the step, from 1.
        position: index of the first element among all of the optimizer's, for stochastic rounding.
    """
    dtype, device = spec.compute_dtype, tensors.param.device
    scale = torch.ones((), dtype=dtype, device=device) if grad_scale is None else grad_scale.to(device, dtype)
    numbers = torch.tensor(scalars(group, step), dtype=torch.float64, device="cpu").to(device, dtype)
    p, v_max, master = tensors.param, tensors.max_exp_avg_sq, tensors.master_param
    theta, m, v, new_v_max = adam_expression(
        p.to(dtype) if master is None else current_master(p, master),
        tensors.grad.to(dtype),
        tensors.exp_avg.to(dtype),
        tensors.exp_avg_sq.to(dtype),
        None if v_max is None else v_max.to(dtype),
        -scale if group["maximize"] else scale,
        numbers,
        decay_of(group),
    )
    tensors.exp_avg.copy_(m)
    tensors.exp_avg_sq.copy_(v)
    if v_max is not None and new_v_max is not None:
        v_max.copy_(new_v_max)
    if master is not None:
        master.copy_(theta)
    if spec.rounding == "stochastic":
        seed = torch.tensor(rounding_seed(int(step), position), dtype=torch.int64, device="cpu")
        theta = round_stochastically(theta, seed)
    p.copy_(theta)
