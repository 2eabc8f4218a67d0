"""Random bits of a step and an element, and stochastic rounding to bfloat16.

They follow from a seed and an index alone, so that they are identical on all ranks, with any number of threads,
and in a resumed run.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

# Tensors whose state is held in few bits are divided into blocks of 32 rows of 16 lanes, from their first
# element on.
BLOCK, LANES = 512, 16

GOLDEN = 0x9E3779B9  # 2³² divided by the golden ratio

Whole = TypeVar("Whole", int, Any)


def rounding_seed(step: Whole, position: Whole) -> Whole:
    """Returns the seed of stochastic rounding, in [0, 2³¹).

    Steps and elements have different random bits; ranks and repeated runs have identical ones.

    Args:
        step: number of the step, from 1; also an int64 array.
        position: index of the first element among all of the optimizer's.
    """
    return (step * 0x9E3779B1 + position) % 2**31


def hashed(seeds: Tensor) -> Tensor:
    """Returns 32 random bits for each seed, an int64 in [0, 2³¹), as int64.

    The finalizer "lowbias32" of Wellons, https://nullprogram.com/blog/2018/07/31/, in int64 without overflow.
    """
    h = ((seeds ^ (seeds >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def words(seed: Tensor, elements: int) -> Tensor:
    """Returns 32 random bits, as int64, for each element of a tensor that is divided into blocks.

    The first row of a block is hashed. The words of a lane, one group of the 8-bit format, then differ by the
    golden ratio: each is uniform, and those of a lane divide the interval evenly, so that rounding errors of a
    group cancel better than independent ones.

    Args:
        seed: of the first element, `rounding_seed`; 0-dimensional int64.
        elements: their number.
    """
    index = torch.arange(elements, dtype=torch.int64, device=seed.device)
    row = index % BLOCK // LANES
    return (hashed((seed + index - row * LANES) & 0x7FFFFFFF) + row * GOLDEN) & 0xFFFFFFFF


def round_up_or_down(x: Tensor, noise: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up where the last 16 bits of x and `noise`, in [0, 2¹⁶), have a carry.

    With uniform noise the expectation is `x`. Infinities and NaN are kept.
    """
    rounded = ((x.view(torch.int32) + noise.to(torch.int32)) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def round_stochastically(x: Tensor, seed: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, up or down with the probabilities that make the expectation `x`.

    Args:
        x: 1-dimensional, float32.
        seed: one int64 in [0, 2³¹).
    """
    # Modulo 2³¹ like the seed: an element's bits must not depend on where the piece that holds it begins.
    seeds = (torch.arange(x.numel(), dtype=torch.int64, device=x.device) + seed) & 0x7FFFFFFF
    return round_up_or_down(x, hashed(seeds) & 0xFFFF)
