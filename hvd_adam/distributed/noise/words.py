"""Numbers of all ranks in a sum over the ranks: exact in every dtype, and each of them by itself.

Each rank writes the digits of its number into words of its own, and zeros into those of the others. All words are
whole numbers up to 255, which float32, float16 and bfloat16 hold exactly, and so does their sum over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = 5  # of a number: 1 if there is one, the exponent, and 3 digits of 8 bits


def encode(number: Tensor, rank: int, ranks: int, *, zero_counts: bool = False) -> Tensor:
    """Returns the words of a rank. Does not wait for the device.

    Args:
        number: 0-dimensional, ≥ 0; rounded to float32. What is not finite then counts as no number.
        rank: whose number it is.
        ranks: number of ranks.
        zero_counts: whether zero is a number.

    Returns:
        `ranks` × WORDS elements, float32, on the same device.
    """
    mantissa, exponent = torch.frexp(number.float())
    digits = []
    rest = mantissa * 256
    for _ in range(3):
        digits.append(rest.floor())
        rest = (rest - digits[-1]) * 256
    own = torch.stack([torch.ones_like(mantissa), exponent.float(), *digits])
    words = torch.zeros(ranks, WORDS, dtype=torch.float32, device=number.device)
    present = own.isfinite().all() if zero_counts else own.isfinite().all() & (mantissa > 0)
    words[rank] = torch.where(present, own, 0.0)
    return words.view(-1)


def decode(words: Sequence[float]) -> list[float]:
    """Returns the number of each rank from the sum of the words of all; NaN for a rank without one."""
    ranks = [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    return [_number(*rank) for rank in ranks]


def _number(present: float, exponent: float, *digits: float) -> float:
    if not present:
        return math.nan
    mantissa = sum(digit * 256.0 ** -(place + 1) for place, digit in enumerate(digits))
    return math.ldexp(mantissa, int(exponent))
