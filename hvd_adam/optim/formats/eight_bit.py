"""Moments in 8 bits: one code for each element, and one scale for each group of 32.

FlashOptim (arXiv 2602.23349) has the idea: int8 of the first moment, finer near 0; uint8 of the root of the second
one; groups of 32. What differs here, and why:

- **Scales are bfloat16**, not float16: a float16 loses gradients below 6e-8 and above 65504, this one neither.
  A scale is rounded up from the largest magnitude s of its group, so that no code is clipped, and is at least
  2⁻¹⁰⁴.
- **A group is a lane of a block**: of 512 consecutive elements those whose index has the same remainder modulo
  16, so that 16 groups are updated in one vector register, and maxima and scales need no exchange between its
  lanes. Blocks begin at the parameter's first element. A parameter of n elements has ⌈n/512⌉ · 16 scales: 2 +
  1/8 bytes an element.
- **Finer near 0 by two straight segments**: code c stands for the level L(c) = c up to |c| = 64, and 64 + 4
  (|c| − 64) beyond, with L(127) = 316. Decoding needs no division, and every level is exact.
- **The second moment has no code for 0** (as in arXiv 2309.01507): codes are 1 to 255. A root rounded to 0 under a
  first moment that is not would make the next step gigantic. (The state before the first step has scale 0.)
- **Rounding is stochastic**: nearest codes stand still. With β₂ = 0.999 a root changes by less than half a code in
  almost every step, so it would grow with large gradients and never shrink.

Errors, in exact arithmetic, with s the largest magnitude of a group and S its scale, s ≤ S ≤ s (1 + 2⁻⁷), or
S = 2⁻¹⁰⁴ where s is smaller:

- first moment: two codes differ by S/316 for |m| ≤ 64 S/316 ≈ 0.2 S, and by S/79 beyond. Stochastic rounding
  errs by less than that, nearest by half of it.
- root of the second moment: by less than S/255, nearest by half of it, except below S/255: the result is S/255,
  so the error is less than that, too.

float32 adds: a level is x = fl(m · fl(k/S)), k/S and the product rounded once, 2u relative (u = 2⁻²⁴) of at
most 316 · 64 units, < 0.003 units, and decoding again 3u; the rounding of x to whole units (1/64, or 1/4096 of a
code) adds half a unit. So a code that is decoded and encoded again with the same scale is the same code, with any
random bits.

A group with a value that is not finite (or ≥ 3.39e38, or whose square is) has scale NaN: all of it is decoded
to NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.optim.formats.random_bits import BLOCK, LANES

KNEE, LEVELS = 64, 316  # codes up to KNEE are levels; the largest code, 127, is level LEVELS
CODES = 255  # of the root of the second moment

# Of a code, before the random bits are added and the rest is cut off.
FIRST_UNITS, SECOND_UNITS = 64, 4096

# Bits of bfloat16. The square of a decoded root must be finite.
SMALLEST_SCALE, NO_SCALE = 23 << 7, 0x7FC0
LARGEST_FIRST, LARGEST_SECOND = 0x7F7F, 0x5F7F


def scales_of(elements: int) -> int:
    """Returns the number of scales of a tensor."""
    return -(-elements // BLOCK) * LANES


def spread(scales: Tensor, elements: int) -> Tensor:
    """Returns each element's scale."""
    return scales.view(-1, 1, LANES).expand(-1, BLOCK // LANES, LANES).reshape(-1)[:elements]


def levels(codes: Tensor) -> Tensor:
    """Returns the levels of codes of the first moment, in [−316, 316], as float32."""
    wide = codes.to(torch.float32)
    return wide + 3 * (wide - wide.clamp(-KNEE, KNEE))


def decode_exp_avg(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns first moments in float32.

    Args:
        codes: int8, 1-dimensional, in the order of the parameter's memory.
        scales: bfloat16, `scales_of(len(codes))`.
    """
    return levels(codes) * (spread(scales, codes.numel()).float() / LEVELS)


def decode_exp_avg_sq(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns second moments in float32.

    Args:
        codes: uint8, 1-dimensional, in the order of the parameter's memory.
        scales: bfloat16, `scales_of(len(codes))`.
    """
    return (codes.to(torch.float32) * (spread(scales, codes.numel()).float() / CODES)).square()


def encode_exp_avg(exp_avg: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the codes, int8, and the scales, bfloat16, of first moments.

    Args:
        exp_avg: float32, 1-dimensional.
        random: `random_bits.words` of the elements; None rounds to the nearest code.
    """
    scales = _scales(exp_avg, LARGEST_FIRST)
    finite = spread(scales, exp_avg.numel()).isfinite()
    units = exp_avg * spread(_quotient(LEVELS * FIRST_UNITS, scales), exp_avg.numel())
    units = torch.where(finite, units, 0.0).round().to(torch.int32)
    quarter = units >> 2
    limit = KNEE * FIRST_UNITS * 3 // 4
    units = quarter + (units - quarter).clamp(-limit, limit)
    noise = FIRST_UNITS // 2 if random is None else (random & 0xFFFF) >> 10
    return ((units + noise) >> 6).to(torch.int8), scales


def encode_exp_avg_sq(root: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8, and the scales, bfloat16, of second moments.

    Args:
        root: their square root: float32, 1-dimensional.
        random: as in `encode_exp_avg`.
    """
    scales = _scales(root, LARGEST_SECOND)
    finite = spread(scales, root.numel()).isfinite()
    units = root * spread(_quotient(CODES * SECOND_UNITS, scales), root.numel())
    units = torch.where(finite, units, 0.0).round().to(torch.int32)
    noise = SECOND_UNITS // 2 if random is None else random >> 20
    codes = ((units + noise) >> 12).clamp(min=1)
    return torch.where(finite, codes, 0).to(torch.uint8), scales


def exact_sqrt(x: Tensor) -> Tensor:
    """Returns the correctly rounded square root of float32, which PyTorch's is not on every CPU."""
    return x.double().sqrt().float()


def _quotient(units: int, scales: Tensor) -> Tensor:
    """Returns a number divided by scales; PyTorch would multiply it by their reciprocals."""
    return torch.full_like(scales, units, dtype=torch.float32) / scales.float()


def _scales(values: Tensor, limit: int) -> Tensor:
    """Returns the scales of groups: bfloat16, their largest magnitude rounded up."""
    bits = values.view(torch.int32) & 0x7FFFFFFF  # in the order of magnitudes, NaN last
    padded = torch.nn.functional.pad(bits, (0, -values.numel() % BLOCK))
    largest = padded.view(-1, BLOCK // LANES, LANES).amax(dim=1).view(-1).to(torch.int64)
    scales = ((largest + 0xFFFF) >> 16).clamp(min=SMALLEST_SCALE)
    return torch.where(scales > limit, NO_SCALE, scales).to(torch.int16).view(torch.bfloat16)
