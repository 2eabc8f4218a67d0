"""The Adam update for GPUs, in Triton: `expression.adam_expression` in one pass over flat buffers.

Why not `torch.compile`: a launch of this kernel costs the host less, its numbers are arguments and are not read
from memory, a NaN grad_scale on the device makes it change nothing, and a machine without a GPU can interpret it
and compile it for one (tests/test_triton_kernel.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_adam.optim.expression import Buffers, Scalars

# 8 elements a thread: two accesses of 16 bytes to each float32 buffer.
BLOCK = 1024
WARPS = 4

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    """Returns the square root; of float32 the correctly rounded one: the fast one flushes subnormals to 0."""
    return tl.sqrt_rn(x) if DTYPE is tl.float32 else tl.sqrt(x)


@triton.jit
def _current_master(wide, master, HALF_EPS: tl.constexpr, TINY: tl.constexpr):
    """As `expression.current_master`."""
    infinity = float("inf")
    is_rounded = tl.abs(wide - master) <= HALF_EPS * tl.abs(master) + TINY
    kept = (is_rounded & (tl.abs(master) < infinity)) | (tl.abs(wide) == infinity)
    return tl.where(kept, master, wide)


@triton.jit
def _round_stochastically(x, places, seed):
    """As `expression.round_stochastically`, to the bit; returns float32 that bfloat16 represents exactly."""
    h = ((places + seed) & 0x7FFFFFFF).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    noise = (h ^ (h >> 16)) & 0xFFFF
    rounded = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit(do_not_specialize=["seed"])
def adam(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    master_param,
    device_scale,
    float64_scalars,
    elements,
    seed,
    host_scale,
    weight_decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    DTYPE: tl.constexpr,
    DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HALF_EPS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block; see `arguments`."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # beyond 2³¹ elements, too
    if float64_scalars is not None:  # Triton has no float64 arguments
        host_scale = tl.load(float64_scalars)
        weight_decay = tl.load(float64_scalars + 1)
        one_minus_beta1 = tl.load(float64_scalars + 2)
        beta2 = tl.load(float64_scalars + 3)
        one_minus_beta2 = tl.load(float64_scalars + 4)
        step_size = tl.load(float64_scalars + 5)
        eps = tl.load(float64_scalars + 6)
    scale = tl.cast(host_scale, DTYPE)
    if device_scale is not None:
        scale *= tl.load(device_scale).to(DTYPE)
        elements = tl.where(scale == scale, elements, 0)  # NaN: change nothing
    inside = places < elements

    theta = tl.load(param + places, inside).to(DTYPE)
    g = tl.load(grad + places, inside).to(DTYPE) * scale
    m = tl.load(exp_avg + places, inside).to(DTYPE)
    v = tl.load(exp_avg_sq + places, inside).to(DTYPE)
    if master_param is not None:
        theta = _current_master(theta, tl.load(master_param + places, inside), HALF_EPS, TINY)

    if DECAY == "coupled":
        g += weight_decay * theta
    if DECAY == "decoupled":
        theta += weight_decay * theta
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    tl.store(exp_avg + places, m, inside)
    tl.store(exp_avg_sq + places, v, inside)
    if max_exp_avg_sq is not None:
        largest = tl.load(max_exp_avg_sq + places, inside).to(DTYPE)
        v = tl.where((largest >= v) | (largest != largest), largest, v)  # NaN is kept, as in torch.maximum
        tl.store(max_exp_avg_sq + places, v, inside)
    theta -= step_size * (m / (_root(v, DTYPE) + eps))

    if master_param is not None:
        tl.store(master_param + places, theta, inside)
    if STOCHASTIC:
        theta = _round_stochastically(theta, places, seed)
    tl.store(param + places, theta, inside)


@cache
def _constants(rounding: str, decay: str, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments that are compiled into the kernel."""
    compute, info = torch.promote_types(dtype, torch.float32), torch.finfo(dtype)
    has_masters = rounding == "master"
    return {
        "DTYPE": _TYPES[compute],
        "DECAY": decay,
        "STOCHASTIC": rounding == "stochastic",
        "HALF_EPS": info.eps / 2 if has_masters else 0.0,
        "TINY": info.smallest_normal * info.eps if has_masters else 0.0,
        "BLOCK": BLOCK,
    }


def arguments(
    rounding: str, decay: str, buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int
) -> dict[str, Any]:
    """Returns the arguments of `adam` by name, in its order.

    Args:
        rounding: as in `expression.KernelSpec`.
        decay: as in `expression.KernelSpec`.
        buffers: what to update.
        grad_scale: multiplies the gradient; 0-dimensional; None for 1. A NaN on the buffers' device makes the
            update change nothing.
        scalars: the numbers of the step.
        seed: of stochastic rounding, in [0, 2³¹).
    """
    param = buffers.param
    device_scale, host_scale = grad_scale, 1.0
    if grad_scale is not None and grad_scale.device != param.device:
        device_scale, host_scale = None, float(grad_scale)
    float64_scalars = None
    if param.dtype == torch.float64:
        numbers = torch.tensor((host_scale, *scalars), dtype=torch.float64, device="cpu", pin_memory=param.is_cuda)
        float64_scalars = numbers.to(param.device, non_blocking=True)
    return {
        "param": param,
        "grad": buffers.grad,
        "exp_avg": buffers.exp_avg,
        "exp_avg_sq": buffers.exp_avg_sq,
        "max_exp_avg_sq": buffers.max_exp_avg_sq,
        "master_param": buffers.master_param,
        "device_scale": device_scale,
        "float64_scalars": float64_scalars,
        "elements": param.numel(),
        "seed": seed,
        "host_scale": host_scale,
        "weight_decay": scalars.weight_decay,
        "one_minus_beta1": scalars.one_minus_beta1,
        "beta2": scalars.beta2,
        "one_minus_beta2": scalars.one_minus_beta2,
        "step_size": scalars.step_size,
        "eps": scalars.eps,
        **_constants(rounding, decay, param.dtype),
    }


def update(
    rounding: str, decay: str, buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int
) -> None:
    """Takes one step of Adam over whole buffers, in place, without synchronizing host and device.

    Args: see `arguments`.
    """
    param = buffers.param
    launch = adam[(triton.cdiv(param.numel(), BLOCK),)]
    # Triton launches on the current device, which may be another than the buffers'.
    elsewhere = param.is_cuda and param.device.index != torch.cuda.current_device()
    with torch.cuda.device(param.device) if elsewhere else nullcontext():
        launch(**arguments(rounding, decay, buffers, grad_scale, scalars, seed), num_warps=WARPS)
