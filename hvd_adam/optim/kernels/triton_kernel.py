"""The Adam update for GPUs, in Triton: `expression.adam_expression` in one pass over a list of tensors.

Why not `torch.compile`: a launch of this kernel costs the host less, it takes any number of tensors wherever they
lie, a NaN grad_scale on the device makes it change nothing, and a machine without a GPU can interpret it and
compile it for one (tests/test_triton_kernel.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from hvd_adam.optim.expression import KernelSpec

# 8 elements a thread: two accesses of 16 bytes to each float32 tensor.
BLOCK = 1024
WARPS = 4

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
TYPES[torch.float64] = tl.float64

# The first columns of all kernels' tables of tensors on the device; a table has one line for each tensor.
COMMON = ("param", "elements", "first_block", "position")
WHOLE = (*COMMON, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
# Of the hyper-parameters: what multiplies the gradients, the `expression.Scalars`, the number of the step.
REAL = ("scale", "weight_decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "eps", "step")


@triton.jit
def root(x, DTYPE: tl.constexpr):
    """Returns the square root; of float32 the correctly rounded one: the fast one flushes subnormals to 0."""
    return tl.sqrt_rn(x) if DTYPE is tl.float32 else tl.sqrt(x)


@triton.jit
def current_master(wide, master, HALF_EPS: tl.constexpr, TINY: tl.constexpr):
    """As `expression.current_master`."""
    infinity = float("inf")
    is_rounded = tl.abs(wide - master) <= HALF_EPS * tl.abs(master) + TINY
    kept = (is_rounded & (tl.abs(master) < infinity)) | (tl.abs(wide) == infinity)
    return tl.where(kept, master, wide)


@triton.jit
def round_stochastically(x, places, seed):
    """As `expression.round_stochastically`, to the bit; returns float32 that bfloat16 represents exactly."""
    h = ((places + seed) & 0x7FFFFFFF).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    noise = (h ^ (h >> 16)) & 0xFFFF
    rounded = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def pointer(whole, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the pointer in a column of the table, aligned to 16 bytes if all are."""
    pointer = tl.load(whole + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    whole,
    grad,
    scale,
    weight_decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    step,
    places,
    inside,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECAY: tl.constexpr,
    ROUNDING: tl.constexpr,
    HALF_EPS: tl.constexpr,
    TINY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates the elements at `places` of one tensor; those that are not `inside` are left alone; None for all."""
    param = pointer(whole, 0, PARAM, ALIGNED) + places
    exp_avg = pointer(whole, 4, MOMENT, ALIGNED) + places
    exp_avg_sq = pointer(whole, 5, MOMENT, ALIGNED) + places

    theta = tl.load(param, inside).to(DTYPE)
    g = tl.load(pointer(grad, 0, PARAM, ALIGNED) + places, inside).to(DTYPE) * scale
    m = tl.load(exp_avg, inside).to(DTYPE)
    v = tl.load(exp_avg_sq, inside).to(DTYPE)
    if ROUNDING == "master":
        master_param = pointer(whole, 7, tl.float32, ALIGNED) + places
        theta = current_master(theta, tl.load(master_param, inside), HALF_EPS, TINY)

    if DECAY == "coupled":
        g += weight_decay * theta
    if DECAY == "decoupled":
        theta += weight_decay * theta
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    tl.store(exp_avg, m, inside)
    tl.store(exp_avg_sq, v, inside)
    if AMSGRAD:
        max_exp_avg_sq = pointer(whole, 6, MOMENT, ALIGNED) + places
        largest = tl.load(max_exp_avg_sq, inside).to(DTYPE)
        v = tl.where((largest >= v) | (largest != largest), largest, v)  # NaN is kept, as in torch.maximum
        tl.store(max_exp_avg_sq, v, inside)
    theta -= step_size * (m / (root(v, DTYPE) + eps))

    if ROUNDING == "master":
        tl.store(master_param, theta, inside)
    if ROUNDING == "stochastic":
        # As `expression.rounding_seed`; what follows takes the remainder.
        seed = tl.cast(step, tl.int64) * 0x9E3779B1 + tl.load(whole + 3)
        theta = round_stochastically(theta, places, seed)
    tl.store(param, theta, inside)


@triton.jit
def adam(
    whole,
    grads,
    tensor_of_block,
    real,
    device_scale,
    scale,
    weight_decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    eps,
    step,
    AMSGRAD: tl.constexpr,
    DECAY: tl.constexpr,
    ALIGNED: tl.constexpr,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    HALF_EPS: tl.constexpr,
    TINY: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block of one tensor; see `triton_launch.arguments`."""
    block = tl.program_id(0)
    tensor = tl.load(tensor_of_block + block)
    whole += tensor * WHOLE
    grad = grads + tensor
    if real is not None:
        real += tensor * REAL
        scale = tl.load(real)
        weight_decay = tl.load(real + 1)
        one_minus_beta1 = tl.load(real + 2)
        beta2 = tl.load(real + 3)
        one_minus_beta2 = tl.load(real + 4)
        step_size = tl.load(real + 5)
        eps = tl.load(real + 6)
        step = tl.load(real + 7)
    elements = tl.load(whole + 1)
    if device_scale is not None:
        on_device = tl.load(device_scale).to(DTYPE)
        elements = tl.where(on_device == on_device, elements, 0)  # NaN: change nothing
        scale *= on_device
    start = (block - tl.load(whole + 2)) * BLOCK  # int64: beyond 2³¹ elements, too
    places = start + tl.arange(0, BLOCK)
    # Whole blocks without a mask, whose accesses are wide: a mask that depends on the data would make them narrow.
    if start + BLOCK <= elements:
        _update(
            whole, grad, scale, weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, step,
            places, None,
            PARAM, MOMENT, DTYPE, AMSGRAD, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip
    else:
        _update(
            whole, grad, scale, weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, step,
            places, places < elements,
            PARAM, MOMENT, DTYPE, AMSGRAD, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip


def rounding_constants(spec: KernelSpec) -> dict[str, Any]:
    """Returns both kernels' arguments of how parameters are stored, in the order of their signatures."""
    info = torch.finfo(spec.dtype)
    has_masters = spec.rounding == "master"
    return {
        "ROUNDING": spec.rounding,
        "HALF_EPS": info.eps / 2 if has_masters else 0.0,
        "TINY": info.smallest_normal * info.eps if has_masters else 0.0,
    }


@cache
def constants(spec: KernelSpec) -> dict[str, Any]:
    """Returns the arguments of `adam` that are compiled into the kernel of a spec."""
    return {
        "PARAM": TYPES[spec.dtype],
        "MOMENT": TYPES[spec.moment_dtype],
        "DTYPE": TYPES[spec.compute_dtype],
        **rounding_constants(spec),
        "WHOLE": len(WHOLE),
        "REAL": len(REAL),
        "BLOCK": BLOCK,
    }
