"""The state tensors of a parameter in the format that it is held in, and the conversion from another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_adam.optim.expression import current_master
from hvd_adam.optim.formats import choice
from hvd_adam.optim.formats.correction import correction_of, decode_parameter
from hvd_adam.optim.formats.eight_bit import (
    decode_exp_avg,
    decode_exp_avg_sq,
    encode_exp_avg,
    encode_exp_avg_sq,
    exact_sqrt,
    scales_of,
)
from hvd_adam.optim.formats.random_bits import BLOCK, LANES
from hvd_adam.optim.memory import in_same_order, is_dense, memory_order

FIRST_CODES, SECOND_CODES = ("exp_avg_codes", "exp_avg_scales"), ("exp_avg_sq_codes", "exp_avg_sq_scales")
SCALES = frozenset({FIRST_CODES[1], SECOND_CODES[1]})
CORRECTION = "param_correction"

# Names that a state has only where something is held in few bits.
IN_FEW_BITS = frozenset({FIRST_CODES[0], CORRECTION})

# Elements of a parameter to a scale: a shard of scales begins at the index of its elements divided by this.
ELEMENTS_PER_SCALE = BLOCK // LANES


def elements_each(name: str) -> int:
    """Returns the number of a parameter's elements to an element of a state tensor."""
    return ELEMENTS_PER_SCALE if name in SCALES else 1


class Entry(NamedTuple):
    """A state tensor of a parameter.

    Attributes:
        dtype: its dtype.
        of_blocks: whether it has one element for each scale, instead of one for each element of the parameter.
    """

    dtype: torch.dtype
    of_blocks: bool = False

    def elements(self, count: int) -> int:
        """Returns the number of its elements for so many of a parameter."""
        return scales_of(count) if self.of_blocks else count


def entries(group: Mapping[str, Any], p: Tensor) -> dict[str, Entry]:
    """Returns the state tensors of a parameter by name; "step" is not included."""
    held, stored = choice.state_format(group, p), choice.rounding(group, p)
    if held == "8bit":
        scales = Entry(torch.bfloat16, of_blocks=True)
        found = {"exp_avg_codes": Entry(torch.int8), "exp_avg_sq_codes": Entry(torch.uint8)}
        found |= {"exp_avg_scales": scales, "exp_avg_sq_scales": scales}
    else:
        dtype = torch.bfloat16 if held == "bfloat16" else p.dtype if stored == "nearest" else torch.float32
        found = {"exp_avg": Entry(dtype), "exp_avg_sq": Entry(dtype)}
        if group["amsgrad"]:
            found["max_exp_avg_sq"] = Entry(dtype)
    if stored == "master":
        found["master_param"] = Entry(torch.float32)
    if stored == "correction":
        found[CORRECTION] = Entry(torch.int8)
    return found


def convert(state: dict[str, Any], p: Tensor, wanted: Mapping[str, Entry], own: Tensor) -> None:
    """Gives a state the names that are wanted, in place, from what it has in another format.

    Args:
        state: of the parameter, or of a part of it in the order of memory.
        p: the parameter.
        wanted: as `entries` returns it.
        own: the elements of the parameter that the state belongs to, 1-dimensional.
    """
    if FIRST_CODES[0] in wanted and not codes_are_in_order(state, p):  # scales belong to elements that follow
        _decode(state, p)
    if FIRST_CODES[0] in wanted and "exp_avg" in state:
        first, second = (_flat(state.pop(name), p) for name in ("exp_avg", "exp_avg_sq"))
        state.pop("max_exp_avg_sq", None)
        _put(state, FIRST_CODES, *encode_exp_avg(first), p)
        _put(state, SECOND_CODES, *encode_exp_avg_sq(exact_sqrt(second)), p)
    elif "exp_avg" in wanted and FIRST_CODES[0] in state:
        _decode(state, p)
    if CORRECTION in wanted and "master_param" in state:
        master = _flat(state.pop("master_param"), p)
        state[CORRECTION] = _shaped(correction_of(own, current_master(own, master)), None, p)
    elif "master_param" in wanted and CORRECTION in state:
        correction = state.pop(CORRECTION)
        state["master_param"] = _shaped(decode_parameter(own, _in_memory(correction, p)), correction, p)


def _decode(state: dict[str, Any], p: Tensor) -> None:
    """Replaces the codes of both moments."""
    for name, names, decode in zip(
        ("exp_avg", "exp_avg_sq"), (FIRST_CODES, SECOND_CODES), (decode_exp_avg, decode_exp_avg_sq), strict=True
    ):
        codes, scales = (state.pop(key) for key in names)
        dense = codes if is_dense(codes) else torch.empty_like(codes).copy_(codes)
        moment = decode(memory_order(dense, 0, dense.numel()), scales).as_strided(dense.shape, dense.stride())
        state[name] = _shaped(_in_memory(moment, p), codes, p)


def fits(state: Mapping[str, Any], p: Tensor, wanted: Mapping[str, Entry]) -> bool:
    """Returns whether a state need not be converted to have the names that are wanted."""
    named = wanted.keys() <= state.keys() or not IN_FEW_BITS & {*wanted, *state}
    return named and codes_are_in_order(state, p)


def codes_are_in_order(state: Mapping[str, Any], p: Tensor) -> bool:
    """Returns whether the codes of a state lie in memory as the parameter's elements do, if there are any.

    They no longer do after `Module.to(memory_format=…)`, or if they have been saved with another format.
    """
    found = [state[name] for name, _ in (FIRST_CODES, SECOND_CODES) if name in state]
    strides = torch.empty_like(p, device="meta").stride() if found else ()
    return all(codes.shape != p.shape or in_same_order(codes, strides) for codes in found)


def is_in_few_bits(state: Mapping[str, Any], p: Tensor) -> bool:
    """Returns whether `decoded` would replace a tensor of a parameter's state; not where it is a shard."""
    in_codes = any(state[name].shape == p.shape for name in IN_FEW_BITS & state.keys())
    return in_codes or ("exp_avg" in state and _is_narrow(state["exp_avg"], p))


def _is_narrow(moment: Tensor, p: Tensor) -> bool:
    return moment.dtype == torch.bfloat16 != p.dtype


def decoded(state: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    """Returns the state of a whole parameter with float32 tensors in place of codes; others are not copied."""
    found = dict(state)
    plain = {"exp_avg": Entry(torch.float32)} if FIRST_CODES[0] in state else {}
    if CORRECTION in state:
        plain["master_param"] = Entry(torch.float32)
    convert(found, p, plain, memory_order(p.detach(), 0, p.numel()))
    for name in ("exp_avg", "exp_avg_sq"):
        if name in found and _is_narrow(found[name], p):
            found[name] = found[name].float()
    return found


def part_of_scales(scales: Tensor, skip: int, length: int) -> Tensor:
    """Returns the scales of elements [skip, skip + length) of a parameter."""
    first = skip // ELEMENTS_PER_SCALE
    return scales[first : first + scales_of(length)].clone()


def _in_memory(t: Tensor, p: Tensor) -> Tensor:
    """Returns a tensor in the order of the parameter's memory, 1-dimensional."""
    if t.dim() == 1 and t.shape != p.shape:
        return t
    return memory_order(torch.empty_like(p, dtype=t.dtype).copy_(t), 0, p.numel())


def _flat(t: Tensor, p: Tensor) -> Tensor:
    return _in_memory(t, p).float()


def _shaped(flat: Tensor, like: Tensor | None, p: Tensor) -> Tensor:
    """Returns a tensor of all elements with the parameter's shape and strides, and that of a part as it is."""
    if flat.numel() != p.numel() or (like is not None and like.shape != p.shape):
        return flat
    return flat.as_strided(p.shape, torch.empty_like(p, device="meta").stride())


def _put(state: dict[str, Any], names: tuple[str, str], codes: Tensor, scales: Tensor, p: Tensor) -> None:
    state[names[0]], state[names[1]] = _shaped(codes, None, p), scales
