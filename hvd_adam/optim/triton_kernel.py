"""The Adam update for GPUs, in Triton: `fused.adam_expression` in one pass over flat buffers.

Written out, not left to `torch.compile`: a launch then costs the host little, takes its numbers as arguments, not
from memory, changes nothing where a grad_scale on the device says so, and can be run, and compiled for a GPU, on a
machine that has none (tests/test_triton_kernel.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# 8 elements a thread: two accesses of 16 bytes to each float32 buffer.
BLOCK = 1024
WARPS = 4

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

Buffers = dict[str, "Tensor | None"]


@triton.jit
def _root(x, DTYPE: tl.constexpr):
    """The square root; of float32 not the quick one, which takes the smallest numbers for 0."""
    return tl.sqrt_rn(x) if DTYPE is tl.float32 else tl.sqrt(x)


@triton.jit
def _current_master(wide, master, HALF_EPS: tl.constexpr, TINY: tl.constexpr):
    """As `fused.current_master`."""
    infinity = float("inf")
    is_rounded = tl.abs(wide - master) <= HALF_EPS * tl.abs(master) + TINY
    kept = (is_rounded & (tl.abs(master) < infinity)) | (tl.abs(wide) == infinity)
    return tl.where(kept, master, wide)


@triton.jit
def _round_stochastically(x, places, seed):
    """As `fused.round_stochastically`, to the bit; float32 that a bfloat16 can hold."""
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
    device_factor,
    numbers,
    elements,
    seed,
    grad_scale,
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
    """One block of the update; see `arguments`."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # beyond 2³¹ elements, too
    if numbers is not None:  # in float64, which Triton does not take as arguments
        grad_scale = tl.load(numbers)
        weight_decay = tl.load(numbers + 1)
        one_minus_beta1 = tl.load(numbers + 2)
        beta2 = tl.load(numbers + 3)
        one_minus_beta2 = tl.load(numbers + 4)
        step_size = tl.load(numbers + 5)
        eps = tl.load(numbers + 6)
    scale = tl.cast(grad_scale, DTYPE)
    if device_factor is not None:
        scale *= tl.load(device_factor).to(DTYPE)
        elements = tl.where(scale == scale, elements, 0)  # NaN: nothing is to be changed
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
        v = tl.where((largest >= v) | (largest != largest), largest, v)  # NaN stays, as in torch.maximum
        tl.store(max_exp_avg_sq + places, v, inside)
    theta -= step_size * (m / (_root(v, DTYPE) + eps))

    if master_param is not None:
        tl.store(master_param + places, theta, inside)
    if STOCHASTIC:
        theta = _round_stochastically(theta, places, seed)
    tl.store(param + places, theta, inside)


@cache
def _constants(rounding: str, decay: str, dtype: torch.dtype) -> tuple[object, ...]:
    """The arguments that are compiled in."""
    compute, info = torch.promote_types(dtype, torch.float32), torch.finfo(dtype)
    masters = rounding == "master"
    half_eps, tiny = (info.eps / 2, info.smallest_normal * info.eps) if masters else (0.0, 0.0)
    return (_TYPES[compute], decay, rounding == "stochastic", half_eps, tiny, BLOCK)


def arguments(
    rounding: str, decay: str, buffers: Buffers, grad_scale: Tensor | None, scalars: tuple[float, ...], seed: int
) -> tuple[object, ...]:
    """What `adam` is called with, in order.

    Args:
        rounding: as in `fused.KernelSpec`.
        decay: as in `fused.KernelSpec`.
        buffers: those of `fused.Buffers`, in its order; None for what a variant does without.
        grad_scale: multiplies the gradient: 0-dimensional, None for 1. One on the buffers' device, and is
            NaN, makes the update change nothing.
        scalars: what `fused.scalars` returns.
        seed: of stochastic rounding, in [0, 2³¹).
    """
    param, on_host, numbers = buffers["param"], 1.0, None
    if grad_scale is not None and grad_scale.device != param.device:
        grad_scale, on_host = None, float(grad_scale)
    if param.dtype == torch.float64:
        numbers = torch.tensor((on_host, *scalars), dtype=torch.float64, pin_memory=param.is_cuda)
        numbers = numbers.to(param.device, non_blocking=True)
    constants = _constants(rounding, decay, param.dtype)
    return (*buffers.values(), grad_scale, numbers, param.numel(), seed, on_host, *scalars, *constants)


def update(
    rounding: str, decay: str, buffers: Buffers, grad_scale: Tensor | None, scalars: tuple[float, ...], seed: int
) -> None:
    """One step of Adam over whole buffers, in place; what `arguments` takes. The host waits for nothing."""
    param = buffers["param"]
    launch = adam[(triton.cdiv(param.numel(), BLOCK),)]
    # Triton launches on the current device, which need not be the buffers'.
    elsewhere = param.is_cuda and param.device.index != torch.cuda.current_device()
    with torch.cuda.device(param.device) if elsewhere else nullcontext():
        launch(*arguments(rounding, decay, buffers, grad_scale, scalars, seed), num_warps=WARPS)
