"""bfloat16 parameters with an 8-bit correction: together the first 24 bits of a float32.

A float32 that is cut to its first 24 bits is a bfloat16, rounded to nearest, and the signed last byte: what has
been added to round the first 16 bits is what the byte is below 0. So the pair has 16 significant bits like
FlashOptim's (arXiv 2602.23349, a correction of 1/127 half units in the last place), but is exact: decoding needs
no division, loses nothing, covers subnormal numbers, and what is not changed is encoded to the same bits.

Error: rounding to 24 bits is stochastic and errs by less than 2⁻¹⁵ of the value, by 2⁻¹⁶ if it is to nearest. The
expectation is exact, so that updates below it are not lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INFINITY = 0x7F800000


def decode_parameter(param: Tensor, correction: Tensor) -> Tensor:
    """Returns float32 parameters.

    Args:
        param: bfloat16. If it has been changed since, the result is within half a unit in its last place: 0
            becomes less than 2⁻¹³³. NaN stays NaN.
        correction: int8, of the same shape.
    """
    bits = param.float().view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF) + correction.to(torch.int32) * 256
    kept = (magnitude.clamp(0, _INFINITY) | (bits & -0x80000000)).view(torch.float32)
    return torch.where(param.isnan(), param.float(), kept)


def encode_parameter(x: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns bfloat16 parameters and their corrections, int8.

    Args:
        x: float32.
        random: `random_bits.words` of the elements; None rounds to the nearest of 24 bits, ties away from 0.
    """
    bits = x.view(torch.int32)
    noise = 0x80 if random is None else ((random >> 2) & 0xFF).to(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).to(torch.int64) + noise
    param = (((magnitude + 0x8000) & 0xFFFF0000).to(torch.int32) | (bits & -0x80000000)).view(torch.float32)
    byte = (magnitude >> 8) & 0xFF
    finite = x.isfinite()
    correction = torch.where(finite, byte - 256 * (byte >> 7), 0).to(torch.int8)
    return torch.where(finite, param, x).to(torch.bfloat16), correction


def correction_of(param: Tensor, x: Tensor) -> Tensor:
    """Returns the corrections, int8, that make `decode_parameter` return x, to nearest, where param is x rounded.

    Args:
        param: bfloat16.
        x: float32. Where it is not param, rounded to nearest, the correction is 0.
    """
    difference = x.view(torch.int32).to(torch.int64) - param.float().view(torch.int32)
    rounded = (difference.abs() <= 0x8000) & ~param.isnan() & ~x.isnan()
    return torch.where(rounded, ((difference + 0x80) >> 8).clamp(-128, 127), 0).to(torch.int8)
