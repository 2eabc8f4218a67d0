"""The Adam update as one pass over flat buffers: one expression, compiled by PyTorch to C++ with OpenMP for CPUs.

For GPUs it is written in Triton's terms (triton_kernel.py), and compared with the expression before it is used.
Reading p, g, m, v and writing p, m, v once each is the least that Adam can do: everything else of a step
(averaging, unscaling, clipping, weight decay, rounding) happens in registers on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hvd_adam.optim.inductor_kernel import innermost
from hvd_adam.optim.kernel_cache import compiling, discard

# Large enough that the compiler divides the loop among threads.
_EXAMPLE_ELEMENTS = 1 << 20

Scalars = tuple[float, ...]


class NoKernel(RuntimeError):
    """The update cannot be compiled on this machine; says why in one line."""


@dataclass(frozen=True)
class KernelSpec:
    """What is compiled in. Everything else (length, learning rate, step, grad_scale) is data.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of parameters and gradients.
        moment_dtype: of the moments.
        amsgrad: keep and use the largest second moment.
        decay: "none", "coupled" (into the gradient) or "decoupled" (beside the update).
        rounding: how half-precision parameters are stored: "nearest", "master" (float32 copies are what is
            updated) or "stochastic".
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
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def name(self) -> str:
        """Fit for a file name."""
        return "adam-" + "-".join(str(value).removeprefix("torch.") for value in astuple(self))


@dataclass
class Buffers:
    """1-dimensional, contiguous, of one length and device; those that a spec does without are None."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master_param: Tensor | None = None

    def split(self, elements: int) -> list[Buffers]:
        """Pieces of at most so many elements, as views."""
        columns = [[None] if t is None else t.split(elements) for t in vars(self).values()]
        count = len(columns[0])
        return [Buffers(*row) for row in zip(*(c * count if c == [None] else c for c in columns), strict=True)]


# An update of whole buffers, in place, from a grad_scale (or None), scalars and a seed.
Kernel = Callable[[Buffers, "Tensor | None", Scalars, int], None]


def scalars(group: dict, step: float) -> Scalars:
    """What the update of step `step` ≥ 1 takes from the hyper-parameters.

    With c₁ = 1−β₁ᵗ and c₂ = 1−β₂ᵗ the update α·(m/c₁) / (√(v/c₂) + ε) is (α·√c₂/c₁)·m / (√v + ε·√c₂), the
    form at the end of section 2 of Kingma & Ba, arXiv 1412.6980, with their ε̂ = ε·√c₂.
    """
    beta1, beta2 = group["betas"]
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    root = (1 - beta2**step) ** 0.5
    return (
        -weight_decay * lr if group["decoupled_weight_decay"] else weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr * root / (1 - beta1**step),
        group["eps"] * root,
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
    """θ, m, v and the largest v after a step, all in one dtype; `grad_scale` multiplies the gradient first."""
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
    """float32 to bfloat16, up or down with the probabilities that make the expectation `x`.

    The random bits are a hash of (seed, index), so that all ranks, and a resumed run, round alike. Infinities and
    NaN stay what they are.

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
    """`master`, but `p` wherever somebody has changed it since (`load_state_dict`, `clamp_`, …).

    What is farther from its master than rounding puts it has been changed; an infinity may be an overflow.
    """
    # Not `p == master.to(p.dtype)`: the compiler leaves conversions there and back away.
    info, wide = torch.finfo(p.dtype), p.to(master.dtype)
    rounding = info.eps / 2 * master.abs() + info.smallest_normal * info.eps
    kept = ((wide - master).abs() <= rounding) & master.isfinite() | wide.isinf()
    return torch.where(kept, master, wide)


def _update(spec: KernelSpec, p, g, m, v, v_max, master, grad_scale, scalars, seed) -> None:  # noqa: ANN001
    """What is compiled: one pass over the buffers."""
    dtype = spec.compute_dtype
    moments = [None if t is None else t.to(dtype) for t in (m, v, v_max)]
    theta = p.to(dtype) if master is None else current_master(p, master)
    theta, *moments = adam_expression(theta, g.to(dtype), *moments, grad_scale, scalars, spec.decay)
    for old, new in zip((m, v, v_max), moments, strict=True):
        if old is not None:
            old.copy_(new)
    if master is not None:
        master.copy_(theta)
    p.copy_(round_stochastically(theta, seed) if spec.rounding == "stochastic" else theta)


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def update(spec: KernelSpec, buffers: Buffers, grad_scale: Tensor | None, numbers: Scalars, seed: int) -> None:
    """One step of Adam over whole buffers, in place.

    Args:
        spec: fits the buffers.
        buffers: on one device.
        grad_scale: multiplies the gradient: 0-dimensional. None: 1. One that lies on a GPU, and is NaN, makes the
            update change nothing.
        numbers: what `scalars` returns.
        seed: of stochastic rounding, in [0, 2³¹).

    Raises:
        NoKernel: it cannot be compiled here; nothing has been changed.
    """
    _kernel(spec)(buffers, grad_scale, numbers, seed)


def compile_error(spec: KernelSpec) -> str | None:
    """Compiles the spec, or takes it from the cache: None, or in one line why that cannot be."""
    try:
        _kernel(spec)
    except NoKernel as error:
        return str(error)
    return None


_failed: dict[KernelSpec, str] = {}


@cache
def _kernel(spec: KernelSpec) -> Kernel:
    if spec not in _failed:
        try:
            return _compared(spec) if spec.device == "cuda" else _cached(spec)
        except Exception as error:
            _failed[spec] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise NoKernel(_failed[spec])


def _cached(spec: KernelSpec) -> Kernel:
    """Takes the kernel from this host's cache, or leaves it there. (Triton has a cache of its own.)"""
    try:
        with compiling(spec.name):
            return _compared(spec)
    except Exception:
        # A damaged cache is the one cause that can be put right: without it, once more.
        discard()
        return _compared(spec)


def _compared(spec: KernelSpec) -> Kernel:
    """Compiles, and compares examples with the expression uncompiled."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kernel = _COMPILERS[spec.device](spec)
        for elements in (_EXAMPLE_ELEMENTS, 1001):
            made, expected = _example(spec, elements), _example(spec, elements)
            kernel(*made)
            _update(spec, *_tensors(spec, *expected))
            for ours, theirs in zip(vars(made[0]).values(), vars(expected[0]).values(), strict=True):
                if ours is not None and not torch.allclose(ours, theirs, rtol=2**-6, atol=1e-6):
                    raise RuntimeError("the compiled kernel computes something else than its source")
    return kernel


def _compile_for_gpu(spec: KernelSpec) -> Kernel:
    from hvd_adam.optim import triton_kernel  # here: PyTorch has Triton only where it is built for GPUs

    def kernel(buffers: Buffers, grad_scale: Tensor | None, numbers: Scalars, seed: int) -> None:
        triton_kernel.update(spec.rounding, spec.decay, vars(buffers), grad_scale, numbers, seed)

    return kernel


def _compile_for_cpu(spec: KernelSpec) -> Kernel:
    """Compiles by way of example."""

    def one_pass(*arguments: Tensor | None) -> None:
        _update(spec, *arguments)

    # PyTorch limits the compilations of one code object: each spec gets its own.
    one_pass.__code__ = one_pass.__code__.replace(co_name=spec.name)
    code = innermost(one_pass, _tensors(spec, *_example(spec, _EXAMPLE_ELEMENTS)))

    def kernel(buffers: Buffers, grad_scale: Tensor | None, numbers: Scalars, seed: int) -> None:
        code(*_tensors(spec, buffers, grad_scale, numbers, seed))

    return kernel


_COMPILERS = {"cpu": _compile_for_cpu, "cuda": _compile_for_gpu}


def _tensors(
    spec: KernelSpec, buffers: Buffers, grad_scale: Tensor | None, numbers: Scalars, seed: int
) -> list[Tensor | None]:
    """What `_update` takes."""
    device, dtype = buffers.param.device, spec.compute_dtype
    # By way of NumPy, which is the quicker one for so few numbers.
    few = np.array(numbers, dtype=np.float64 if dtype == torch.float64 else np.float32)
    return [
        *vars(buffers).values(),
        _one(device, dtype) if grad_scale is None else grad_scale.to(device, dtype),
        torch.from_numpy(few).to(device),
        torch.tensor(seed) if spec.rounding == "stochastic" else None,
    ]


def _example(spec: KernelSpec, n: int) -> tuple[Buffers, None, Scalars, int]:
    """What a kernel takes."""
    wave = torch.linspace(-3, 3, n, device=spec.device)
    zeros = [torch.zeros(n, dtype=spec.moment_dtype, device=spec.device) for _ in range(3)]
    buffers = Buffers(
        param=wave.to(spec.dtype),
        grad=wave.cos().to(spec.dtype),
        exp_avg=zeros[0],
        exp_avg_sq=zeros[1],
        max_exp_avg_sq=zeros[2] if spec.amsgrad else None,
        master_param=wave.clone() if spec.rounding == "master" else None,
    )
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False}
    return buffers, None, scalars(hyper, 1), 7
