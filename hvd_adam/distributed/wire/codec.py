"""Codes of 8 and 4 bits for gradients, with error feedback: plain torch operations.

They define the codes bit for bit: every operation is rounded once, in float32, in the order that is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
"""Elements that the Walsh-Hadamard transform mixes."""

SCALE_BYTES = 2
"""Size of a scale: bfloat16."""

SMALLEST = 2.0**-100
"""Blocks whose largest magnitude is smaller are not sent: their error stays in the residual."""

SENT = 0.25
"""Fraction of a residual that each update sends.

A residual of white rounding errors of variance σ² has the variance σ²/(1 − (1 − SENT)²), and what is decoded has
the noise σ²·(1 + SENT/(2 − SENT)): 1.14 σ², where all of the residual at once makes it 2 σ². A power of two, which
rounds nothing.
"""


@dataclass(frozen=True)
class Codec:
    """A format: each block of elements becomes integer codes and one bfloat16 scale.

    The payload of n elements has n·bits/8 bytes of codes, then n/block scales. Of two 4-bit codes in one byte, the
    low nibble is the first; both are two's complements.

    The interval [−m, m], with m the largest magnitude of a block, is divided into as many equal cells as there are
    codes. A code stands for the middle of its cell. The scale is the size of a cell, rounded up.

    Attributes:
        bits: bits per code, 8 or 4.
        block: elements with one scale.
        levels: largest code; codes are in [−levels, levels].
        rotated: the codes are those of the Walsh-Hadamard transform of each `GROUP` of elements, which spreads a
            large element over its group, so that it does not make all others 0.
    """

    bits: int
    block: int
    levels: int
    rotated: bool

    def code_bytes(self, elements: int) -> int:
        """Returns the size in bytes of the codes of so many elements, a multiple of `block`."""
        return elements * self.bits // 8

    def payload_bytes(self, elements: int) -> int:
        """Returns the size in bytes of codes and scales of so many elements, a multiple of `block`."""
        return self.code_bytes(elements) + elements // self.block * SCALE_BYTES

    def elements(self, payload_bytes: int) -> int:
        """Returns how many elements a payload of this size encodes."""
        return payload_bytes // self.payload_bytes(self.block) * self.block

    def blocks(self, payload: Tensor) -> int:
        """Returns how many blocks each row of a payload encodes."""
        return self.elements(payload.shape[-1]) // self.block


CODECS = {
    "int8": Codec(bits=8, block=256, levels=127, rotated=False),
    "int4": Codec(bits=4, block=32, levels=7, rotated=True),
}


class Own(NamedTuple):
    """What a rank adds itself, of the part of the sum that it sends: its own gradients, which need no codes.

    Attributes:
        gradients: [k or less], float32, float16 or bfloat16, contiguous; the rest is padding.
        rank: of this rank: where in the order they are added.
        scale: factor of the gradients, rounded to float32.
    """

    gradients: Tensor
    rank: int
    scale: float

    def scaled(self, elements: int) -> Tensor:
        """Returns gradients · scale, float32, with zeros up to a number of elements."""
        values = self.gradients.float() * self.scale
        missing = elements - len(values)
        return torch.nn.functional.pad(values, (0, missing)) if missing else values


def encode(
    codec: Codec,
    gradients: Tensor,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    scale: float,
    unit: float,
) -> None:
    """Encodes t = gradients · scale + SENT · residual · unit, and computes the new residual.

    It is what the codes miss of h = gradients · scale + residual · unit; t is h − (1 − SENT) · residual · unit, in
    this order of operations.

    A block that is not finite, or would not be when it is decoded, gets the scale NaN and decodes to NaN. A block
    whose gradients are all 0, or whose magnitudes are less than `SMALLEST`, gets the scale 0: nothing of it is
    sent, and its residual keeps all of h.

    Args:
        codec: the format.
        gradients: [n], float32, float16 or bfloat16; contiguous.
        residual: [m], float32, m = n or more, a multiple of parts · block. Elements n to m are padding.
        new_residual: [m], float32: receives (h − decoded t) / unit. May be `residual` itself.
        payload: [parts, bytes], uint8, contiguous: receives codes and scales of the m/parts elements of each part.
        scale: factor of the gradients, rounded to float32.
        unit: units of the gradients per unit of the residual (the loss scale), rounded to float32; > 0.
    """
    e = residual * unit
    h = e.clone()
    h[: len(gradients)] += gradients.float() * scale
    zero = torch.ones_like(h, dtype=torch.bool)
    zero[: len(gradients)] = gradients == 0
    t = h - e * (1 - SENT)
    t = _rotate(t) if codec.rotated else t
    decoded = unrotate(codec, _quantize(codec, t, zero.view(-1, codec.block).all(dim=1, keepdim=True), payload))
    torch.div(h - decoded, _divisor(h, unit), out=new_residual)


def add_and_encode(
    codec: Codec,
    payloads: Tensor,
    own: Own | None,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    unit: float,
) -> None:
    """Adds the same part of all ranks in float32, in rank order, and encodes t = sum + SENT · residual · unit.

    As in `encode`, with h = sum + residual · unit. The sum and the residual stay rotated if the codes are.

    Args:
        codec: the format.
        payloads: [ranks, bytes], uint8, contiguous: this rank's part, encoded by each rank.
        own: added in place of what this rank has encoded; None to add that.
        residual: [k], float32, of the k elements of this part.
        new_residual: [k], float32: receives (h − decoded t) / unit. May be `residual` itself.
        payload: [bytes], uint8, contiguous: receives the codes and scales of the sum.
        unit: as in `encode`.
    """
    h = torch.zeros_like(residual)
    for rank, part in enumerate(_dequantize(codec, payloads)):
        if own is not None and rank == own.rank:
            part = own.scaled(len(h))
            part = _rotate(part) if codec.rotated else part
        h += part
    e = residual * unit
    h += e
    t = h - e * (1 - SENT)
    keep = torch.zeros(len(t) // codec.block, 1, dtype=torch.bool, device=t.device)
    decoded = _quantize(codec, t, keep, payload)
    torch.div(h - decoded, _divisor(h, unit), out=new_residual)


def decode(codec: Codec, payloads: Tensor, out: Tensor) -> None:
    """Decodes the parts one after the other.

    Args:
        codec: the format.
        payloads: [ranks, bytes], uint8, contiguous: codes and scales of the sum of each part.
        out: [n], contiguous, float32, float16 or bfloat16: receives the first n elements.
    """
    out.copy_(unrotate(codec, _dequantize(codec, payloads).view(-1))[: len(out)])


def largest_scale(codec: Codec, payload: Tensor) -> Tensor:
    """Returns the largest scale of a payload, [..., bytes], as 0-dimensional float32; NaN if one is."""
    size = codec.code_bytes(codec.elements(payload.shape[-1]))
    stored = payload[..., size:].contiguous().view(torch.int16)  # of numbers that are not negative; NaN is largest
    return _widened(stored.amax())


def unrotate(codec: Codec, values: Tensor) -> Tensor:
    """Returns the elements of sums, or of a residual of `add_and_encode`, which are rotated if the codes are."""
    return _rotate(values) * (1 / GROUP) if codec.rotated else values


def _quantize(codec: Codec, t: Tensor, keep: Tensor, payload: Tensor) -> Tensor:
    """Writes codes and scales of t into the payload, and returns what they decode to, still rotated.

    Args:
        codec: the format.
        t: [m].
        keep: [blocks, 1], bool: blocks of which nothing is sent.
        payload: [parts, bytes] or [bytes].
    """
    blocks = t.view(-1, codec.block)
    largest = blocks.abs().amax(dim=1, keepdim=True)  # NaN if any is
    finite = (largest * GROUP if codec.rotated else largest).isfinite()  # else rotating back might overflow
    sent = finite & (largest >= SMALLEST) & ~keep
    cells = torch.full_like(largest, codec.levels + 0.5)  # tensors: torch multiplies by the reciprocal of a number
    stored = _rounded_up(torch.where(sent, largest / cells, 0.0).where(finite, torch.nan))
    scales = _widened(stored)
    codes = (blocks * (1 / scales)).round().clamp(-codec.levels, codec.levels).where(sent, 0.0)
    codes += 0.0  # makes 0 of -0, which has no code

    parts = payload.view(-1, payload.shape[-1])
    size = codec.code_bytes(len(t)) // len(parts)
    integers = codes.to(torch.int8).view(torch.uint8).view(len(parts), -1)
    if codec.bits == 4:
        integers = integers[:, 0::2] & 15 | integers[:, 1::2] << 4
    parts[:, :size] = integers
    parts[:, size:] = stored.view(torch.uint8).view(len(parts), -1)
    return (codes * scales).view(-1)


def _dequantize(codec: Codec, payloads: Tensor) -> Tensor:
    """Returns the decoded elements, [payloads, elements], still rotated."""
    elements = codec.elements(payloads.shape[-1])
    size = codec.code_bytes(elements)
    codes = payloads[:, :size].contiguous().view(torch.int8)
    if codec.bits == 4:
        codes = torch.stack([codes << 4 >> 4, codes >> 4], dim=-1)  # arithmetic shifts extend the sign
    scales = _widened(payloads[:, size:].contiguous().view(torch.int16))
    decoded = codes.reshape(len(payloads), -1, codec.block).float() * scales.unsqueeze(-1)
    return decoded.view(len(payloads), elements)


def _rounded_up(scales: Tensor) -> Tensor:
    """Returns the bits of the next bfloat16 that is not smaller, as int16: the upper half of float32."""
    return (scales.view(torch.int32) + 0xFFFF >> 16).to(torch.int16)


def _widened(stored: Tensor) -> Tensor:
    """Returns the scales that have these bits."""
    return (stored.to(torch.int32) << 16).view(torch.float32)


def _rotate(values: Tensor) -> Tensor:
    """Returns the unnormalized Walsh-Hadamard transform of each group; applied twice, `GROUP` times the values."""
    stride = 1
    while stride < GROUP:
        pairs = values.view(-1, 2, stride)
        first, second = pairs[:, 0], pairs[:, 1]
        values = torch.stack([first + second, first - second], dim=1).view(-1)
        stride *= 2
    return values


def _divisor(like: Tensor, unit: float) -> Tensor:
    return torch.full((), unit, dtype=like.dtype, device=like.device)
