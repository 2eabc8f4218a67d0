"""The Adam update of formats/expression.py for GPUs, in Triton: tensors whose state is held in few bits.

A program updates one block of 512 elements: 32 rows of 16 lanes, each lane a group with a scale of its own.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl

from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.formats import eight_bit, random_bits
from hvd_adam.optim.kernels.triton_kernel import (
    COMMON,
    TYPES,
    current_master,
    pointer,
    root,
    round_stochastically,
    rounding_constants,
)

BLOCK = random_bits.BLOCK
WARPS = 2  # 8 elements a thread, as in triton_kernel.py

# Of the 8-bit format, where kernels can read them.
_KNEE, _CODES = tl.constexpr(eight_bit.KNEE), tl.constexpr(float(eight_bit.CODES * eight_bit.SECOND_UNITS))
_LEVELS = tl.constexpr(float(eight_bit.LEVELS * eight_bit.FIRST_UNITS))
_BEYOND_KNEE = tl.constexpr(3 * eight_bit.KNEE * eight_bit.FIRST_UNITS // 4)
_SMALLEST_SCALE, _NO_SCALE = tl.constexpr(eight_bit.SMALLEST_SCALE), tl.constexpr(eight_bit.NO_SCALE)
_LARGEST_FIRST, _LARGEST_SECOND = tl.constexpr(eight_bit.LARGEST_FIRST), tl.constexpr(eight_bit.LARGEST_SECOND)

# Columns of the table of tensors on the device, one line for each tensor.
WHOLE = (
    *COMMON,
    *("exp_avg", "exp_avg_sq", "exp_avg_scales", "exp_avg_sq_scales", "master_param", "param_correction"),
)
# What multiplies the gradients and the parameters, `formats.expression.factors`, and the number of the step.
REAL = (
    *("scale", "weight_decay", "first_kept", "second_kept", "first_new", "second_new"),
    *("step_size", "eps", "step"),
)


@triton.jit
def _load(place, inside):
    """Loads what is inside, and zeros elsewhere."""
    if inside is None:
        return tl.load(place)
    else:
        return tl.load(place, inside, other=0)


@triton.jit
def _bits(x):
    """Returns the bits of the magnitude of float32."""
    return x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _nearest(x):
    """Returns float32 rounded to the nearest int32, to even; of |x| < 2²²."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _rounded_by(x, noise):
    """As `random_bits.round_up_or_down`; returns float32 that bfloat16 represents exactly."""
    rounded = ((x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), rounded, x)


@triton.jit
def _store_scales(place, largest, LIMIT: tl.constexpr, inside):
    """Stores scales that are no smaller than `largest`, bits of float32; returns them, and which are not NaN."""
    bits = tl.maximum((largest + 0xFFFF) >> 16, _SMALLEST_SCALE)
    finite = bits <= LIMIT
    tl.store(place, tl.where(finite, bits, _NO_SCALE).to(tl.uint16), inside)
    return (bits << 16).to(tl.float32, bitcast=True), finite


@triton.jit
def _scales(place, inside):
    return (_load(place, inside).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _eight_bit(
    whole, g, first_kept, second_kept, first_new, second_new, start, places, inside, any_inside, word,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates moments that are held as codes; returns the first one, and the root of the second one."""
    scales = start // 32 + tl.arange(0, 16)
    first_codes = pointer(whole, 4, tl.int8, ALIGNED) + places
    second_codes = pointer(whole, 5, tl.uint8, ALIGNED) + places
    first_scales = pointer(whole, 6, tl.uint16, ALIGNED) + scales
    second_scales = pointer(whole, 7, tl.uint16, ALIGNED) + scales
    code = _load(first_codes, inside).to(tl.int32)
    level = code + 3 * (code - tl.minimum(tl.maximum(code, -_KNEE), _KNEE))
    m = (_scales(first_scales, any_inside) * first_kept)[None, :] * level.to(tl.float32) + first_new * g
    kept = (_scales(second_scales, any_inside) * second_kept)[None, :]
    kept *= _load(second_codes, inside).to(tl.float32)
    added = second_new * g
    r = root(kept * kept + added * added, tl.float32)

    first_scale, first_finite = _store_scales(first_scales, tl.max(_bits(m), axis=0), _LARGEST_FIRST, any_inside)
    second_scale, second_finite = _store_scales(
        second_scales, tl.max(_bits(r), axis=0), _LARGEST_SECOND, any_inside
    )
    units = _nearest(m * tl.fdiv(_LEVELS, first_scale)[None, :])
    quarter = units >> 2
    units = quarter + tl.minimum(tl.maximum(units - quarter, -_BEYOND_KNEE), _BEYOND_KNEE)
    code = (units + ((word & 0xFFFF) >> 10).to(tl.int32)) >> 6
    tl.store(first_codes, tl.where(first_finite[None, :], code, 0).to(tl.int8), inside)
    units = _nearest(r * tl.fdiv(_CODES, second_scale)[None, :])
    code = tl.maximum((units + (word >> 20).to(tl.int32)) >> 12, 1)
    tl.store(second_codes, tl.where(second_finite[None, :], code, 0).to(tl.uint8), inside)
    return m, r


@triton.jit
def _update(
    whole, grad, scale, weight_decay, first_kept, second_kept, first_new, second_new, step_size, eps, step,
    start, places, inside, any_inside,
    PARAM: tl.constexpr, MOMENT: tl.constexpr, STATE: tl.constexpr, DECAY: tl.constexpr, ROUNDING: tl.constexpr,
    HALF_EPS: tl.constexpr, TINY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates the block at `start`; elements that are not `inside` are left alone; None for all."""
    # As `random_bits.words`: the remainder modulo 2³¹ is taken after the index is added.
    seed = tl.cast(step, tl.int64) * 0x9E3779B1 + tl.load(whole + 3) + start
    h = ((seed + tl.arange(0, 16)) & 0x7FFFFFFF).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    row = tl.arange(0, 32).to(tl.uint32)
    word = (h ^ (h >> 16))[None, :] + (row * 0x9E3779B9)[:, None]

    param = pointer(whole, 0, PARAM, ALIGNED) + places
    stored = _load(param, inside).to(tl.float32)
    theta = stored
    g = _load(pointer(grad, 0, PARAM, ALIGNED) + places, inside).to(tl.float32) * scale
    if ROUNDING == "master":
        master_param = pointer(whole, 8, tl.float32, ALIGNED) + places
        theta = current_master(stored, _load(master_param, inside), HALF_EPS, TINY)
    if ROUNDING == "correction":  # as `correction.decode_parameter`
        correction = pointer(whole, 9, tl.int8, ALIGNED) + places
        signed = _bits(stored).to(tl.int32) + _load(correction, inside).to(tl.int32) * 256
        magnitude = tl.minimum(tl.maximum(signed, 0), 0x7F800000).to(tl.uint32)
        sign = stored.to(tl.uint32, bitcast=True) & 0x80000000
        theta = tl.where(stored == stored, (magnitude | sign).to(tl.float32, bitcast=True), stored)
    if DECAY == "coupled":
        g += weight_decay * theta
    if DECAY == "decoupled":
        theta += weight_decay * theta

    if STATE == "8bit":
        m, r = _eight_bit(
            whole, g, first_kept, second_kept, first_new, second_new, start, places, inside, any_inside, word,
            ALIGNED,
        )  # fmt: skip
    else:
        exp_avg = pointer(whole, 4, MOMENT, ALIGNED) + places
        exp_avg_sq = pointer(whole, 5, MOMENT, ALIGNED) + places
        m = first_kept * _load(exp_avg, inside).to(tl.float32) + first_new * g
        added = second_new * g
        v = second_kept * _load(exp_avg_sq, inside).to(tl.float32) + added * added
        r = root(v, tl.float32)
        if STATE == "bfloat16":
            tl.store(exp_avg, _rounded_by(m, word & 0xFFFF), inside)
            tl.store(exp_avg_sq, _rounded_by(v, word >> 16), inside)
        else:
            tl.store(exp_avg, m, inside)
            tl.store(exp_avg_sq, v, inside)
    theta -= step_size * (m / (r + eps))

    if ROUNDING == "master":
        tl.store(master_param, theta, inside)
    if ROUNDING == "stochastic":
        theta = round_stochastically(theta, places, seed - start)
    if ROUNDING == "correction":  # as `correction.encode_parameter`
        finite = tl.abs(theta) < float("inf")
        kept = _bits(theta) + tl.where(finite, (word >> 2) & 0xFF, 0)
        byte = tl.where(finite, (kept >> 8) & 0xFF, 0)
        tl.store(correction, byte.to(tl.uint8).to(tl.int8, bitcast=True), inside)
        sign = theta.to(tl.uint32, bitcast=True) & 0x80000000
        high = (((kept + 0x8000) & 0xFFFF0000) | sign).to(tl.float32, bitcast=True)
        theta = tl.where(finite, high, theta)
    tl.store(param, theta, inside)


@triton.jit
def adam_in_blocks(
    whole, grads, tensor_of_block, real, device_scale,
    scale, weight_decay, first_kept, second_kept, first_new, second_new, step_size, eps, step,
    DECAY: tl.constexpr, ALIGNED: tl.constexpr, PARAM: tl.constexpr, MOMENT: tl.constexpr, STATE: tl.constexpr,
    ROUNDING: tl.constexpr, HALF_EPS: tl.constexpr, TINY: tl.constexpr, WHOLE: tl.constexpr, REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates one block of one tensor; see `triton_launch.arguments`."""
    block = tl.program_id(0)
    tensor = tl.load(tensor_of_block + block)
    whole += tensor * WHOLE
    grad = grads + tensor
    if real is not None:
        real += tensor * REAL
        scale = tl.load(real)
        weight_decay = tl.load(real + 1)
        first_kept = tl.load(real + 2)
        second_kept = tl.load(real + 3)
        first_new = tl.load(real + 4)
        second_new = tl.load(real + 5)
        step_size = tl.load(real + 6)
        eps = tl.load(real + 7)
        step = tl.load(real + 8)
    elements = tl.load(whole + 1)
    if device_scale is not None:
        on_device = tl.load(device_scale).to(tl.float32)
        elements = tl.where(on_device == on_device, elements, 0)  # NaN: change nothing
        scale *= on_device
    start = (block - tl.load(whole + 2)) * BLOCK  # int64: beyond 2³¹ elements, too
    places = start + tl.arange(0, 32)[:, None] * 16 + tl.arange(0, 16)[None, :]
    # Whole blocks without a mask, whose accesses are wide: a mask that depends on the data would make them narrow.
    if start + BLOCK <= elements:
        _update(
            whole, grad, scale, weight_decay, first_kept, second_kept, first_new, second_new, step_size, eps, step,
            start, places, None, None, PARAM, MOMENT, STATE, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip
    elif start < elements:
        every_lane = tl.arange(0, 16) < 16
        _update(
            whole, grad, scale, weight_decay, first_kept, second_kept, first_new, second_new, step_size, eps, step,
            start, places, places < elements, every_lane,
            PARAM, MOMENT, STATE, DECAY, ROUNDING, HALF_EPS, TINY, ALIGNED,
        )  # fmt: skip


@cache
def constants(spec: KernelSpec) -> dict[str, Any]:
    """Returns the arguments of `adam_in_blocks` that are compiled into the kernel of a spec."""
    return {
        "PARAM": TYPES[spec.dtype],
        "MOMENT": TYPES[spec.moment_dtype],
        "STATE": spec.state_format,
        **rounding_constants(spec),
        "WHOLE": len(WHOLE),
        "REAL": len(REAL),
        "BLOCK": BLOCK,
    }
