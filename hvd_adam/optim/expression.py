"""The fused update as one expression over flat buffers, with its arguments; fused.py compiles it.

Reading p, g, m, v and writing p, m, v once each is the least memory traffic that Adam can have: everything else of
a step (averaging, unscaling, clipping, weight decay, rounding) is computed in registers on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelSpec:
    """What is compiled into a kernel. Everything else (length, learning rate, step, grad_scale) is an argument.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of parameters and gradients.
        moment_dtype: of the moments.
        amsgrad: keep and use the largest second moment.
        decay: "none", "coupled" (added to the gradient) or "decoupled" (applied to the parameter).
        rounding: how half-precision parameters are stored: "nearest", "master" (float32 copies are updated) or
            "stochastic".
    """

    device: str
    dtype: torch.dtype
    moment_dtype: torch.dtype
    amsgrad: bool
    decay: str
    rounding: str

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 parameters, float32 for all others."""
        # Not torch.promote_types: torch 2.1 cannot compile it.
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def name(self) -> str:
        """A name for the spec that can be part of a file name."""
        return "adam-" + "-".join(str(value).removeprefix("torch.") for value in astuple(self))


@dataclass
class Buffers:
    """The tensors of an update: 1-dimensional, contiguous, of one length and device; None if a spec has none."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master_param: Tensor | None = None

    def split(self, elements: int) -> list[Buffers]:
        """Returns views of at most this number of elements each, in order."""
        fields = vars(self).items()
        pieces = {name: t.split(elements) for name, t in fields if t is not None}
        return [Buffers(**dict(zip(pieces, row, strict=True))) for row in zip(*pieces.values(), strict=True)]


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


# Updates whole buffers in place; takes the buffers, a grad_scale or None, the scalars and a seed.
Kernel = Callable[[Buffers, "Tensor | None", Scalars, int], None]


def scalars(group: Mapping[str, Any], step: float) -> Scalars:
    """Returns the numbers of step number `step` ≥ 1 with the hyper-parameters of `group`.

    With c₁ = 1−β₁ᵗ and c₂ = 1−β₂ᵗ the update α·(m/c₁) / (√(v/c₂) + ε) is (α·√c₂/c₁)·m / (√v + ε·√c₂), the
    form at the end of section 2 of Kingma & Ba, arXiv 1412.6980, with their ε̂ = ε·√c₂.
    """
    beta1, beta2 = map(float, group["betas"])
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    root = (1 - beta2**step) ** 0.5
    decay = -weight_decay * lr if group["decoupled_weight_decay"] else weight_decay
    step_size = lr * root / (1 - beta1**step)
    # Positional: keywords would add half a microsecond to each step.
    return Scalars(decay, 1 - beta1, beta2, 1 - beta2, step_size, group["eps"] * root)


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
        decay: as in `KernelSpec`.
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


def round_stochastically(x: Tensor, seed: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up or down with the probabilities that make the expectation `x`.

    The random bits are a hash of (seed, index), so that they are identical on all ranks and in a resumed run.
    Infinities and NaN are kept.

    Args:
        x: 1-dimensional, float32.
        seed: one int64 in [0, 2³¹).
    """
    # The finaliser "lowbias32" of Wellons, https://nullprogram.com/blog/2018/07/31/, in int64 without overflow.
    # Modulo 2³¹ like the seed: an element's bits must not depend on where the piece that holds it begins.
    h = (torch.arange(x.numel(), dtype=torch.int64, device=x.device) + seed) & 0x7FFFFFFF
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    noise = ((h ^ (h >> 16)) & 0xFFFF).to(torch.int32)
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def current_master(p: Tensor, master: Tensor) -> Tensor:
    """Returns `master`, and `p` where it has changed since the last step (`load_state_dict`, `clamp_`, …).

    An element has changed if it is farther from its master than rounding explains; an infinity may be an overflow.
    """
    # Not `p == master.to(p.dtype)`: the compiler omits conversions to a dtype and back.
    info, wide = torch.finfo(p.dtype), p.to(master.dtype)
    rounding = info.eps / 2 * master.abs() + info.smallest_normal * info.eps
    kept = ((wide - master).abs() <= rounding) & master.isfinite() | wide.isinf()
    return torch.where(kept, master, wide)


def update_tensors(
    spec: KernelSpec,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    master: Tensor | None,
    grad_scale: Tensor,
    scalars: Tensor,
    seed: Tensor | None,
) -> None:
    """Takes one step in place: the function that is compiled."""
    dtype = spec.compute_dtype
    theta = p.to(dtype) if master is None else current_master(p, master)
    theta, new_m, new_v, new_v_max = adam_expression(
        theta,
        g.to(dtype),
        m.to(dtype),
        v.to(dtype),
        None if v_max is None else v_max.to(dtype),
        grad_scale,
        scalars,
        spec.decay,
    )
    m.copy_(new_m)
    v.copy_(new_v)
    if v_max is not None and new_v_max is not None:
        v_max.copy_(new_v_max)
    if master is not None:
        master.copy_(theta)
    p.copy_(theta if seed is None else round_stochastically(theta, seed))


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def update_uncompiled(
    spec: KernelSpec, buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int
) -> None:
    """Computes what `update` does in PyTorch's own operations: the reference that kernels are compared with."""
    update_tensors(spec, *update_arguments(spec, buffers, grad_scale, scalars, seed))


def update_arguments(
    spec: KernelSpec, buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Returns the arguments of `update_tensors` after `spec`."""
    device, dtype = buffers.param.device, spec.compute_dtype
    # NumPy converts so few numbers faster than torch.tensor.
    numbers = np.array(scalars, dtype=np.float64 if dtype == torch.float64 else np.float32)
    return (
        buffers.param,
        buffers.grad,
        buffers.exp_avg,
        buffers.exp_avg_sq,
        buffers.max_exp_avg_sq,
        buffers.master_param,
        _one(device, dtype) if grad_scale is None else grad_scale.to(device, dtype),
        torch.from_numpy(numbers).to(device),
        torch.tensor(seed, device="cpu") if spec.rounding == "stochastic" else None,
    )
