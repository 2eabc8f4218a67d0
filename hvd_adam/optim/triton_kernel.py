"""The Adam update for GPUs, in Triton: `expression.adam_expression` in one pass over a list of tensors.

Why not `torch.compile`: a launch of this kernel costs the host less, it takes any number of tensors wherever they
lie, a NaN grad_scale on the device makes it change nothing, and a machine without a GPU can interpret it and
compile it for one (tests/test_triton_kernel.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec, rounding_seed, scalars
from hvd_adam.optim.update_rows import Batch, Kernel, Numbers

# 8 elements a thread: two accesses of 16 bytes to each float32 tensor.
BLOCK = 1024
WARPS = 4

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_TYPES[torch.float64] = tl.float64

Steps = np.ndarray[Any, np.dtype[np.float64]]

# Columns of the two tables on the device, one line for each tensor.
WHOLE = (
    "param",
    "grad",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "master_param",
    "elements",
    "first_block",
    "seed",
)
REAL = ("scale", "weight_decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "eps")


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


@triton.jit
def _pointer(whole, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the pointer in a column of the table, aligned to 16 bytes if all are."""
    pointer = tl.load(whole + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _update(
    whole,
    real,
    scale,
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
    scale *= tl.load(real)
    weight_decay = tl.load(real + 1)
    one_minus_beta1 = tl.load(real + 2)
    beta2 = tl.load(real + 3)
    one_minus_beta2 = tl.load(real + 4)
    step_size = tl.load(real + 5)
    eps = tl.load(real + 6)
    param = _pointer(whole, 0, PARAM, ALIGNED) + places
    exp_avg = _pointer(whole, 2, MOMENT, ALIGNED) + places
    exp_avg_sq = _pointer(whole, 3, MOMENT, ALIGNED) + places

    theta = tl.load(param, inside).to(DTYPE)
    g = tl.load(_pointer(whole, 1, PARAM, ALIGNED) + places, inside).to(DTYPE) * scale
    m = tl.load(exp_avg, inside).to(DTYPE)
    v = tl.load(exp_avg_sq, inside).to(DTYPE)
    if ROUNDING == "master":
        master_param = _pointer(whole, 5, tl.float32, ALIGNED) + places
        theta = _current_master(theta, tl.load(master_param, inside), HALF_EPS, TINY)

    if DECAY == "coupled":
        g += weight_decay * theta
    if DECAY == "decoupled":
        theta += weight_decay * theta
    m += one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    tl.store(exp_avg, m, inside)
    tl.store(exp_avg_sq, v, inside)
    if AMSGRAD:
        max_exp_avg_sq = _pointer(whole, 4, MOMENT, ALIGNED) + places
        largest = tl.load(max_exp_avg_sq, inside).to(DTYPE)
        v = tl.where((largest >= v) | (largest != largest), largest, v)  # NaN is kept, as in torch.maximum
        tl.store(max_exp_avg_sq, v, inside)
    theta -= step_size * (m / (_root(v, DTYPE) + eps))

    if ROUNDING == "master":
        tl.store(master_param, theta, inside)
    if ROUNDING == "stochastic":
        theta = _round_stochastically(theta, places, tl.load(whole + 8))
    tl.store(param, theta, inside)


@triton.jit
def adam(
    whole,
    real,
    tensor_of_block,
    device_scale,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECAY: tl.constexpr,
    ROUNDING: tl.constexpr,
    HALF_EPS: tl.constexpr,
    TINY: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block of one tensor; see `arguments`."""
    block = tl.program_id(0)
    tensor = tl.load(tensor_of_block + block)
    whole += tensor * WHOLE
    real += tensor * REAL
    elements = tl.load(whole + 6)
    scale = tl.cast(1.0, DTYPE)
    if device_scale is not None:
        scale = tl.load(device_scale).to(DTYPE)
        elements = tl.where(scale == scale, elements, 0)  # NaN: change nothing
    start = (block - tl.load(whole + 7)) * BLOCK  # int64: beyond 2³¹ elements, too
    places = start + tl.arange(0, BLOCK)
    # Whole blocks without a mask, whose accesses are wide: a mask that depends on the data would make them narrow.
    if start + BLOCK <= elements:
        _update(
            whole, real, scale, places, None,
            PARAM, MOMENT, DTYPE, AMSGRAD, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip
    else:
        _update(
            whole, real, scale, places, places < elements,
            PARAM, MOMENT, DTYPE, AMSGRAD, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip


class Launch(NamedTuple):
    """Tensors that one launch updates: of one kind.

    Attributes:
        amsgrad: whether they have a largest second moment.
        decay: as `expression.decay_of` returns it.
        rows: their indices in the batch.
    """

    amsgrad: bool
    decay: str
    rows: np.ndarray[Any, np.dtype[Any]]


def launches(batch: Batch, numbers: Numbers) -> list[Launch]:
    """Returns the launches that update a batch; usually one."""
    groups = numbers[batch.rows["group"]]
    decay = np.where(groups["weight_decay"] == 0, 0, np.where(groups["decoupled"], 2, 1))
    kinds = 3 * (batch.rows["max_exp_avg_sq"] != 0) + decay
    return [
        Launch(bool(kind >= 3), ("none", "coupled", "decoupled")[kind % 3], np.flatnonzero(kinds == kind))
        for kind in np.unique(kinds)
    ]


@cache
def constants(spec: KernelSpec) -> dict[str, Any]:
    """Returns the arguments of `adam` that are compiled into the kernel of a spec."""
    info = torch.finfo(spec.dtype)
    has_masters = spec.rounding == "master"
    return {
        "PARAM": _TYPES[spec.dtype],
        "MOMENT": _TYPES[spec.moment_dtype],
        "DTYPE": _TYPES[spec.compute_dtype],
        "ROUNDING": spec.rounding,
        "HALF_EPS": info.eps / 2 if has_masters else 0.0,
        "TINY": info.smallest_normal * info.eps if has_masters else 0.0,
        "WHOLE": len(WHOLE),
        "REAL": len(REAL),
        "BLOCK": BLOCK,
    }


def arguments(
    spec: KernelSpec, launch: Launch, batch: Batch, numbers: Numbers, grad_scale: Tensor | None, steps: Steps
) -> dict[str, Any]:
    """Returns the arguments of `adam` by name, in its order.

    Args:
        spec: of the batch.
        launch: which of its tensors to update.
        batch: what to update.
        numbers: the hyper-parameters of all groups.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1. A NaN on the tensors' device makes the
            update change nothing.
        steps: number of the step that each tensor of the batch takes.
    """
    device = batch.params[0].device
    device_scale, host_scale = grad_scale, 1.0
    if grad_scale is not None and grad_scale.device != device:
        device_scale, host_scale = None, float(grad_scale)
    rows = batch.rows[launch.rows]
    blocks = -(-rows["elements"] // BLOCK)
    whole = np.empty((len(rows), len(WHOLE)), np.int64)
    real = np.empty((len(rows), len(REAL)), np.float64 if spec.dtype == torch.float64 else np.float32)
    for column, name in enumerate(WHOLE[:7]):
        whole[:, column] = rows[name]
    whole[:, 7] = np.cumsum(blocks) - blocks
    steps = steps[launch.rows]
    # Most tensors have the group and the step of others.
    pairs, which = np.unique(np.stack([rows["group"], steps.astype(np.int64)]), axis=1, return_inverse=True)
    known = np.array([scalars(_group(numbers[group]), step) for group, step in pairs.T.tolist()])
    real[:, 0] = host_scale * numbers["sign"][rows["group"]]
    real[:, 1:] = known[which.reshape(-1)]
    whole[:, 8] = rounding_seed(steps.astype(np.int64), rows["position"])
    return {
        "whole": _on_device(whole, device),
        "real": _on_device(real, device),
        "tensor_of_block": _on_device(np.repeat(np.arange(len(rows)), blocks), device),
        "device_scale": device_scale,
        "AMSGRAD": launch.amsgrad,
        "DECAY": launch.decay,
        "ALIGNED": not (whole[:, :6] % 16).any(),
        **constants(spec),
    }


def _group(numbers: Numbers) -> dict[str, Any]:
    """Returns one group's hyper-parameters as `expression.scalars` takes them."""
    group = {name: float(numbers[name]) for name in ("lr", "eps", "weight_decay")}
    betas = float(numbers["beta1"]), float(numbers["beta2"])
    return {**group, "betas": betas, "decoupled_weight_decay": bool(numbers["decoupled"])}


def _on_device(table: np.ndarray[Any, np.dtype[Any]], device: torch.device) -> Tensor:
    """Copies a table to the device without waiting for it."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def kernel(spec: KernelSpec) -> Kernel:
    """Returns the kernel of a spec; it does not synchronize host and device."""

    def run(batch: Batch, numbers: Numbers, grad_scale: Tensor | None) -> None:
        torch._foreach_add_(batch.counts, 1)
        steps = np.array(list(map(Tensor.item, batch.counts)))
        device = batch.params[0].device
        # Triton launches on the current device, which may be another than the tensors'.
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            for launch in launches(batch, numbers):
                given = arguments(spec, launch, batch, numbers, grad_scale, steps)
                if blocks := given["tensor_of_block"].numel():
                    adam[blocks,](**given, num_warps=WARPS)

    return run
