"""The functions of codec.py for GPUs, in Triton, to the bit, each in one pass over memory.

Fused multiply-adds are disabled and divisions are rounded correctly, so that every operation is rounded as in
codec.py. A program computes several blocks, as an array of one row per block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvd_adam.distributed.wire.codec import GROUP, SCALE_BYTES, SENT, SMALLEST, Codec, Own

# Of one program: 16 elements a thread.
ELEMENTS = 2048
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_GROUP = tl.constexpr(GROUP)
_STAGES = tl.constexpr(GROUP.bit_length() - 1)
_SCALE_BYTES = tl.constexpr(SCALE_BYTES)
_SMALLEST = tl.constexpr(SMALLEST)
_WITHHELD = tl.constexpr(1 - SENT)
_NAN = tl.constexpr(0x7FC0)  # in bfloat16
# As in codec_kernel.cpp: the last bits of a number plus this are its nearest integer, ties to even.
_ROUNDER = tl.constexpr(1.5 * 2**23)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rotate(values, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """As in codec.py; each stage transforms the lowest bit of the indices and moves it to the highest place."""
    for _ in tl.static_range(_STAGES):
        first, second = tl.split(tl.reshape(values, (ROWS * BLOCK // _GROUP, _GROUP // 2, 2)))
        values = tl.permute(tl.join(first + second, first - second), (0, 2, 1))
    return tl.reshape(values, (ROWS, BLOCK))


@triton.jit
def _widened(stored):
    """Returns the scales that have these bits in bfloat16, the upper half of float32."""
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _part(payload, block, blocks, CODE_BYTES: tl.constexpr):
    """Returns pointers to the codes and to the scale of each block; `blocks` are in one part."""
    part = payload + block // blocks * blocks * (CODE_BYTES + _SCALE_BYTES)
    place = block % blocks
    return part + place * CODE_BYTES, (part + blocks * CODE_BYTES).to(tl.pointer_type(tl.int16)) + place


@triton.jit
def _quantize(
    t, keep, payload, block, blocks, inside,
    ROWS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Writes codes and scales of the rows of t, and returns what they decode to, still rotated."""
    largest = tl.max(_magnitude_bits(t), axis=1).to(tl.float32, bitcast=True)  # as bits, NaN is the largest
    finite = largest * (_GROUP if ROTATED else 1) < float("inf")  # else rotating back might overflow
    sent = finite & (largest >= _SMALLEST) & ~keep
    exact = tl.div_rn(tl.where(sent, largest, 1.0), tl.full((ROWS,), LEVELS + 0.5, tl.float32))
    rounded_up = (exact.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    inverse = tl.where(sent, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), _widened(rounded_up)), 0.0)
    stored = tl.where(sent, rounded_up, tl.where(finite, 0, _NAN))

    exact_codes = tl.where(finite[:, None], t, 0.0) * inverse[:, None]
    rounded = tl.clamp(exact_codes, -LEVELS, LEVELS) + _ROUNDER
    codes = rounded.to(tl.int32, bitcast=True)
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, (ROWS, BLOCK // 2, 2)))
        codes = (low & 15) | (high << 4)
    to, scales = _part(payload, block, blocks, BLOCK * BITS // 8)
    columns = tl.arange(0, BLOCK * BITS // 8)
    tl.store(to[:, None] + columns[None, :], codes.to(tl.uint8), inside[:, None])
    tl.store(scales, stored.to(tl.int16), inside)
    return (rounded - _ROUNDER) * _widened(stored)[:, None]


@triton.jit
def _dequantize(
    payload, block, blocks, inside, ROWS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Decodes blocks into rows, still rotated."""
    codes, scales = _part(payload, block, blocks, BLOCK * BITS // 8)
    columns = tl.arange(0, BLOCK * BITS // 8)
    integers = tl.load(codes[:, None] + columns[None, :], inside[:, None], other=0).to(tl.int8, bitcast=True)
    if BITS == 4:
        integers = tl.join((integers << 4) >> 4, integers >> 4)  # arithmetic shifts extend the sign
        integers = tl.reshape(integers, (ROWS, BLOCK))
    return integers.to(tl.float32) * _widened(tl.load(scales, inside, other=0))[:, None]


@triton.jit
def encode_blocks(
    gradients, count, residual, new_residual, payload, parts, blocks, factor, unit,
    ROWS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Encodes ROWS blocks, as `hvd_adam_encode` in codec_kernel.cpp."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = first + tl.arange(0, ROWS)
    inside = block < parts * blocks
    places = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    e = tl.load(residual + places, inside[:, None], other=0.0) * unit
    if (first + ROWS) * BLOCK <= count:  # wide accesses, which a mask would make narrow
        g = tl.load(gradients + places).to(tl.float32)
        h = g * factor + e
    else:
        g = tl.load(gradients + places, places < count, other=0.0).to(tl.float32)
        h = tl.where(places < count, g * factor + e, e)  # -0 + 0 would be 0
    t = h - e * _WITHHELD
    if ROTATED:
        t = _rotate(t, ROWS, BLOCK)
    keep = tl.max(_magnitude_bits(g), axis=1) == 0
    decoded = _quantize(t, keep, payload, block, blocks, inside, ROWS, BITS, BLOCK, LEVELS, ROTATED)
    if ROTATED:
        decoded = _rotate(decoded, ROWS, BLOCK) * (1 / _GROUP)
    tl.store(
        new_residual + places, tl.div_rn(h - decoded, tl.full((ROWS, BLOCK), unit, tl.float32)), inside[:, None]
    )


@triton.jit
def add_and_encode_blocks(
    payloads, ranks, blocks, own, count, rank, factor, residual, new_residual, payload, unit,
    ROWS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Adds and encodes ROWS blocks, as `hvd_adam_add_and_encode` in codec_kernel.cpp."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = first + tl.arange(0, ROWS)
    inside = block < blocks
    places = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    h = tl.zeros((ROWS, BLOCK), tl.float32)
    for sender in range(ranks):
        if sender == rank:
            if (first + ROWS) * BLOCK <= count:  # wide accesses, which a mask would make narrow
                g = tl.load(own + places).to(tl.float32) * factor
            else:
                g = tl.load(own + places, places < count, other=0.0).to(tl.float32) * factor
            if ROTATED:
                g = _rotate(g, ROWS, BLOCK)
            h += g
        else:
            h += _dequantize(payloads, sender * blocks + block, blocks, inside, ROWS, BITS, BLOCK)
    e = tl.load(residual + places, inside[:, None], other=0.0) * unit
    h += e
    t = h - e * _WITHHELD
    decoded = _quantize(t, block < 0, payload, block, blocks, inside, ROWS, BITS, BLOCK, LEVELS, ROTATED)
    tl.store(
        new_residual + places, tl.div_rn(h - decoded, tl.full((ROWS, BLOCK), unit, tl.float32)), inside[:, None]
    )


@triton.jit
def decode_blocks(
    payloads, blocks, out, count,
    ROWS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Decodes ROWS blocks, as `hvd_adam_decode` in codec_kernel.cpp."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = first + tl.arange(0, ROWS)
    places = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    decoded = _dequantize(payloads, block, blocks, block * BLOCK < count, ROWS, BITS, BLOCK)
    if ROTATED:
        decoded = _rotate(decoded, ROWS, BLOCK) * (1 / _GROUP)
    decoded = decoded.to(out.dtype.element_ty)
    if (first + ROWS) * BLOCK <= count:  # wide accesses, which a mask would make narrow
        tl.store(out + places, decoded)
    else:
        tl.store(out + places, decoded, places < count)


def encode(
    codec: Codec,
    gradients: Tensor,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    scale: float,
    unit: float,
) -> None:
    """As `codec.encode`."""
    parts, blocks = len(payload), codec.blocks(payload)
    arguments = gradients, len(gradients), residual, new_residual, payload, parts, blocks
    _launch(encode_blocks, codec, parts * blocks, *arguments, float(scale), float(unit))


def add_and_encode(
    codec: Codec,
    payloads: Tensor,
    own: Own | None,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    unit: float,
) -> None:
    """As `codec.add_and_encode`."""
    blocks = codec.blocks(payload)
    gradients, rank, scale = Own(residual[:0], -1, 0.0) if own is None else own
    arguments = payloads, len(payloads), blocks, gradients, len(gradients), rank, float(scale)
    _launch(add_and_encode_blocks, codec, blocks, *arguments, residual, new_residual, payload, float(unit))


def decode(codec: Codec, payloads: Tensor, out: Tensor) -> None:
    """As `codec.decode`."""
    used = triton.cdiv(len(out), codec.block)
    _launch(decode_blocks, codec, used, payloads, codec.blocks(payloads), out, len(out))


def constants(codec: Codec) -> dict[str, Any]:
    """Returns the arguments that are compiled into the kernels of a codec."""
    rows = ELEMENTS // codec.block
    return {
        "ROWS": rows,
        "BITS": codec.bits,
        "BLOCK": codec.block,
        "LEVELS": codec.levels,
        "ROTATED": codec.rotated,
    }


def _launch(kernel: Any, codec: Codec, blocks: int, *arguments: Any) -> None:
    device = arguments[0].device
    compiled_in = constants(codec)
    # Triton launches on the current device, which may be another than the tensors'.
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[triton.cdiv(blocks, compiled_in["ROWS"]),](*arguments, **compiled_in, **OPTIONS)
