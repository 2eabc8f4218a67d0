"""Updates of tensors whose state is held in few bits: decode, update in float32, encode."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hvd_adam.optim.formats import random_bits
from hvd_adam.optim.formats.correction import decode_parameter, encode_parameter
from hvd_adam.optim.formats.eight_bit import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    exact_sqrt,
)
from hvd_adam.optim.formats.held import CORRECTION, FIRST_CODES, SECOND_CODES

Held = Mapping[str, Tensor]


def decode(p: Tensor, held: Held) -> dict[str, Tensor]:
    """Returns "exp_avg", "exp_avg_sq" and, with a correction, "master_param" in float32.

    Args:
        p: elements of a parameter from a multiple of 512 on, 1-dimensional.
        held: their state.
    """
    if FIRST_CODES[0] in held:
        found = {
            "exp_avg": decode_exp_avg(*(held[name] for name in FIRST_CODES)),
            "exp_avg_sq": decode_exp_avg_sq(*(held[name] for name in SECOND_CODES)),
        }
    else:
        found = {name: held[name].float() for name in ("exp_avg", "exp_avg_sq")}
    if CORRECTION in held:
        found["master_param"] = decode_parameter(p, held[CORRECTION])
    elif "master_param" in held:
        found["master_param"] = held["master_param"]
    return found


def encode(p: Tensor, held: Held, updated: Mapping[str, Tensor], state_format: str, seed: int) -> None:
    """Stores an updated state, and with a correction the parameter, in place.

    Args:
        p: as in `decode`.
        held: as in `decode`.
        updated: what `decode` returned, after the update.
        state_format: of the moments.
        seed: of stochastic rounding, `random_bits.rounding_seed` of the first element.
    """
    random = random_bits.words(torch.tensor(seed, dtype=torch.int64, device=p.device), p.numel())
    first, second = updated["exp_avg"], updated["exp_avg_sq"]
    if state_format == "8bit":
        for names, (codes, scales) in (
            (FIRST_CODES, encode_exp_avg(first, random)),
            (SECOND_CODES, encode_exp_avg_sq(exact_sqrt(second), random)),
        ):
            held[names[0]].copy_(codes)
            held[names[1]].copy_(scales)
    elif state_format == "bfloat16":
        held["exp_avg"].copy_(random_bits.round_up_or_down(first, random & 0xFFFF))
        held["exp_avg_sq"].copy_(random_bits.round_up_or_down(second, random >> 16))
    else:
        held["exp_avg"].copy_(first)
        held["exp_avg_sq"].copy_(second)
    if CORRECTION in held:
        param, correction = encode_parameter(updated["master_param"], random)
        p.copy_(param)
        held[CORRECTION].copy_(correction)
