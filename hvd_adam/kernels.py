"""The Adam update as one expression, compiled by PyTorch for CPUs (OpenMP C++) and GPUs (Triton).

Reading p, g, m, v and writing p, m, v once each is the least that Adam can do: everything else of a step
(averaging, unscaling, clipping, weight decay, rounding) happens in registers on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_adam.kernel_cache import compiling, discard

# Large enough that the compiler divides the loop among threads.
_EXAMPLE_ELEMENTS = 1 << 20

Kernel = Callable[..., None]


class NoKernel(RuntimeError):
    """The update cannot be compiled on this machine; says why in one line."""


@dataclass(frozen=True)
class Variant:
    """What is compiled in. Everything else (length, learning rate, step, factor) is data.

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
    """1-dimensional, contiguous, of one length and device; those that a variant does without are None."""

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


def scalars(group: dict, step: float, dtype: torch.dtype) -> Tensor:
    """What the update of step `step` ≥ 1 takes from the hyper-parameters, as one small tensor on the CPU.

    With c₁ = 1−β₁ᵗ and c₂ = 1−β₂ᵗ the update α·(m/c₁) / (√(v/c₂) + ε) is (α·√c₂/c₁)·m / (√v + ε·√c₂), the
    form at the end of section 2 of Kingma & Ba, arXiv 1412.6980, with their ε̂ = ε·√c₂.
    """
    beta1, beta2 = group["betas"]
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    root = (1 - beta2**step) ** 0.5
    values = (
        -weight_decay * lr if group["decoupled_weight_decay"] else weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        lr * root / (1 - beta1**step),
        group["eps"] * root,
    )
    # By way of NumPy, which is the quicker one for so few numbers.
    return torch.from_numpy(np.array(values, dtype=np.float64 if dtype == torch.float64 else np.float32))


def adam_expression(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    factor: Tensor,
    scalars: Tensor,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """θ, m, v and the largest v after a step, all in one dtype; `factor` multiplies the gradient first."""
    weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = scalars.unbind()
    g = g * factor
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


def _update(variant: Variant, p, g, m, v, v_max, master, factor, scalars, seed) -> None:  # noqa: ANN001
    """What is compiled: one pass over the buffers."""
    dtype = variant.compute_dtype
    moments = [None if t is None else t.to(dtype) for t in (m, v, v_max)]
    theta = p.to(dtype) if master is None else current_master(p, master)
    theta, *moments = adam_expression(theta, g.to(dtype), *moments, factor, scalars, variant.decay)
    for old, new in zip((m, v, v_max), moments, strict=True):
        if old is not None:
            old.copy_(new)
    if master is not None:
        master.copy_(theta)
    p.copy_(round_stochastically(theta, seed) if variant.rounding == "stochastic" else theta)


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def update(variant: Variant, buffers: Buffers, factor: Tensor | None, scalars: Tensor, seed: int) -> None:
    """One step of Adam over whole buffers, in place.

    Args:
        variant: fits the buffers.
        buffers: on one device.
        factor: multiplies the gradient: 0-dimensional. None: 1.
        scalars: what `scalars` returns, in the compute dtype.
        seed: of stochastic rounding, in [0, 2³¹).

    Raises:
        NoKernel: it cannot be compiled here; nothing has been changed.
    """
    kernel = _kernel(variant)
    device, dtype = buffers.param.device, variant.compute_dtype
    factor = _one(device, dtype) if factor is None else factor.to(device, dtype)
    if variant.device == "cuda":  # pinned, so that the host need not wait for the device
        scalars = scalars.pin_memory().to(factor.device, non_blocking=True)
    number = torch.tensor(seed) if variant.rounding == "stochastic" else None
    kernel(*vars(buffers).values(), factor, scalars, number)


def why_not(variant: Variant) -> str | None:
    """Compiles the variant, or takes it from the cache: None, or in one line why that cannot be."""
    try:
        _kernel(variant)
    except NoKernel as error:
        return str(error)
    return None


_failed: dict[Variant, str] = {}


@cache
def _kernel(variant: Variant) -> Kernel:
    if variant not in _failed:
        try:
            with compiling(variant.name):
                return _compiled(variant)
        except Exception:
            # A damaged cache is the one cause that can be put right: without it, once more.
            discard()
        try:
            return _compiled(variant)
        except Exception as error:
            _failed[variant] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise NoKernel(_failed[variant])


def _compiled(variant: Variant) -> Kernel:
    """Compiles by way of example, and compares examples with the same expression uncompiled."""

    def one_pass(*arguments: Tensor | None) -> None:
        _update(variant, *arguments)

    # PyTorch limits the compilations of one code object: each variant gets its own.
    one_pass.__code__ = one_pass.__code__.replace(co_name=variant.name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if variant.device == "cpu":
            kernel = _innermost(one_pass, _example(variant, _EXAMPLE_ELEMENTS))
        else:
            kernel = torch.compile(one_pass, fullgraph=True, dynamic=True)
        for elements in (_EXAMPLE_ELEMENTS, 1001):
            made, expected = _example(variant, elements), _example(variant, elements)
            kernel(*made)
            _update(variant, *expected)
            for ours, theirs in zip(made, expected, strict=True):
                if ours is not None and not torch.allclose(ours, theirs, rtol=2**-6, atol=1e-6):
                    raise RuntimeError("the compiled kernel computes something else than its source")
    return kernel


def _innermost(one_pass: Kernel, example: list[Tensor | None]) -> Kernel:
    """What `torch.compile` makes of a function of tensors of one length, without what it puts around it.

    That looks at the arguments, and at the state of the whole process, on every call, compiles anew where
    something has changed, and takes 0.4 ms where caches are cold, as they are after a step over 11 M parameters
    (6 ms). None of it matters here: what does is in the variant, and lengths are data. (On a GPU they are not
    beyond 2³¹ elements, where indices need 64 bits, and the host runs ahead anyway.)
    """
    # Here: it takes a second to import.
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    calls = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Kernel:
        def compile_innermost(*args: Any, **kwargs: Any) -> Callable[[list], Any]:
            code = compile_fx_inner(*args, **kwargs)

            def remembered(arguments: list) -> Any:
                calls.append((code, [*arguments]))
                return code(arguments)

            remembered._boxed_call = True  # it takes its arguments in one list, which it may empty
            return remembered

        # The number of threads is that of the time of the call, not of the compilation.
        return compile_fx(graph, examples, compile_innermost, config_patches={"cpp.dynamic_threads": True})

    # A cache that would leave `compile_innermost` out.
    known = hasattr(config, "enable_autograd_cache")
    with config.patch(enable_autograd_cache=False) if known else nullcontext():
        torch.compile(one_pass, fullgraph=True, dynamic=True, backend=backend)(*example)
    [(code, received)] = calls
    code = getattr(code, "current_callable", None) or code
    places = {tensor.data_ptr(): place for place, tensor in enumerate(example) if tensor is not None}
    # It takes what it uses, in an order of its own, and the length.
    order = [None if isinstance(argument, int) else places[argument.data_ptr()] for argument in received]

    def kernel(*arguments: Tensor | None) -> None:
        length = arguments[0].numel()
        code([length if place is None else arguments[place] for place in order])

    return kernel


def _example(variant: Variant, n: int) -> list[Tensor | None]:
    device = variant.device
    wave = torch.linspace(-3, 3, n, device=device)
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False}
    zeros = [torch.zeros(n, dtype=variant.moment_dtype, device=device) for _ in range(3)]
    return [
        wave.to(variant.dtype),
        wave.cos().to(variant.dtype),
        zeros[0],
        zeros[1],
        zeros[2] if variant.amsgrad else None,
        wave.clone() if variant.rounding == "master" else None,
        torch.ones((), dtype=variant.compute_dtype, device=device),
        scalars(hyper, 1, variant.compute_dtype).to(device),
        torch.tensor(7) if variant.rounding == "stochastic" else None,
    ]
