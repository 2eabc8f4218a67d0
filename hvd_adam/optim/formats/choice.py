"""Which format the state of a parameter is held in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_adam.optim.memory import is_dense, is_ordinary

STATE_FORMATS = ("float32", "bfloat16", "8bit")

# Smaller tensors keep ordinary state: they are few bytes, and among them are biases and norms, whose elements
# are too few and too different to share scales. The number is that of bitsandbytes and torchao.
MIN_ELEMENTS = 4096

_WIDE = (torch.float32, torch.bfloat16, torch.float16)


def can_be_held_in_few_bits(p: Tensor) -> bool:
    """Returns whether a parameter has at least two dimensions and `MIN_ELEMENTS` elements, without gaps in memory.

    The answer is the same for all strategies and numbers of ranks.
    """
    large = p.dim() >= 2 and p.numel() >= MIN_ELEMENTS
    return large and p.dtype in _WIDE and is_ordinary(p) and is_dense(p)


def state_format(group: Mapping[str, Any], p: Tensor) -> str:
    """Returns how the moments of a parameter are held: "float32" (of any dtype), "bfloat16" or "8bit"."""
    wanted: str = group["state_format"]
    return wanted if wanted != "float32" and can_be_held_in_few_bits(p) else "float32"


def rounding(group: Mapping[str, Any], p: Tensor) -> str:
    """Returns how a parameter is stored: "nearest", "master", "correction" or "stochastic"."""
    masters = group["master_weights"]
    if masters and p.dtype in (torch.float16, torch.bfloat16):
        corrected = masters == "8bit" and p.dtype == torch.bfloat16 and can_be_held_in_few_bits(p)
        return "correction" if corrected else "master"
    return "stochastic" if group["stochastic_rounding"] and p.dtype == torch.bfloat16 else "nearest"
