"""The state tensors of each parameter: their names, dtypes and initial values, and how they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_adam.optim.formats.eight_bit import scales_of
from hvd_adam.optim.formats.held import (
    IN_FEW_BITS,
    SCALES,
    Entry,
    convert,
    decoded,
    entries,
    fits,
    is_in_few_bits,
    part_of_scales,
)
from hvd_adam.optim.memory import Arena, memory_order, same_objects

Group = dict[str, Any]
State = dict[str, Tensor]
States = MutableMapping[Tensor, Any]  # `Optimizer.state`, a defaultdict


class Part(NamedTuple):
    """The elements of a parameter that this process updates: all of them, or this rank's shard.

    Attributes:
        skip: index of the first one, in the order of the parameter's memory.
        length: their number.
        whole: whether state tensors have the parameter's shape; otherwise they have `length` elements.
    """

    skip: int
    length: int
    whole: bool = True

    @classmethod
    def of(cls, p: Tensor) -> Part:
        """Returns all elements of a parameter."""
        return cls(0, p.numel())


class Member(NamedTuple):
    """A parameter that an optimizer updates.

    Attributes:
        param: the parameter.
        group: index of its group.
        position: index of its first element among all of the optimizer's.
        part: what is updated of it.
    """

    param: Tensor
    group: int
    position: int
    part: Part


REQUIRED_STATE = ("step", "exp_avg", "exp_avg_sq")
STATE_NAMES = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"),
    *("exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales", "param_correction"),
)


def is_adams_state(state: Any) -> bool:
    """Returns whether an entry of `Optimizer.state` has what every state of Adam has."""
    if not isinstance(state, dict) or "step" not in state:
        return False
    return all(name in state or f"{name}_codes" in state for name in REQUIRED_STATE[1:])


def arena_for(params: Iterable[tuple[Tensor, Group]]) -> Arena:
    """Returns memory for the whole state of some parameters, given with their groups."""
    sizes = ((p.numel(), entry) for p, group in params for entry in entries(group, p).values())
    return Arena(sum(entry.elements(n) * entry.dtype.itemsize + Arena.GAP for n, entry in sizes))


def ensure_state(
    states: States, p: Tensor, group: Group, part: Part | None = None, arena: Arena | None = None
) -> State:
    """Makes the state of a parameter complete, and lie in memory as the parameter, or its shard, does.

    Args:
        states: `Optimizer.state`, a defaultdict; missing tensors are created, and those that do not fit replaced.
        p: the parameter.
        group: its parameter group.
        part: what this process updates of the parameter; None for all. If it is not whole, tensors are
            1-dimensional.
        arena: memory for new tensors; None for PyTorch's.

    Returns:
        The tensors that the update uses; there may be others.

    Raises:
        RuntimeError: a tensor has another shape than the parameter.
    """
    part, arena = part or Part.of(p), arena or Arena(0)
    state = states[p]
    state["step"] = _step_count(state.get("step"))
    used = {"step": state["step"]}
    dense = torch.empty_like(p, device="meta")
    wanted = entries(group, p)
    if not fits(state, p, wanted):
        convert(state, p, wanted, _own_elements(state, p, part))
    for name, entry in wanted.items():
        dtype = entry.dtype
        if name not in state:
            state[name] = _initial(name, p, entry, part, arena)
        found = state[name]
        if entry.of_blocks:
            used[name] = state[name] = shard_of(name, found, p, part)
            continue
        shape, strides = (p.shape, dense.stride()) if part.whole else ((part.length,), (1,))
        if found.shape != shape and found.shape != p.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(found.shape)}, but its parameter has shape {tuple(p.shape)}"
            )
        if found.shape != shape:
            state[name] = _shard_of(found, p, dtype, part)
        elif (found.dtype, found.device, found.stride()) != (dtype, p.device, strides) or found.is_neg():
            state[name] = torch.empty_strided(shape, strides, dtype=dtype, device=p.device).copy_(found)
        used[name] = state[name]
    return used


def _step_count(found: Any) -> Tensor:
    """Returns a step count as the update needs it: float32, 0-dimensional, on the CPU."""
    if isinstance(found, Tensor) and found.is_cpu and found.dtype == torch.float32 and found.dim() == 0:
        return found
    return torch.tensor(0.0 if found is None else float(found), dtype=torch.float32, device="cpu")


def _own_elements(state: State, p: Tensor, part: Part) -> Tensor:
    """Returns the elements of a parameter that its state belongs to: all, unless it is a shard's."""
    shapes = [state[name].shape for name in STATE_NAMES if name in state and not name.endswith("scales")]
    skip, length = (0, p.numel()) if p.shape in shapes else (part.skip, part.length)
    return memory_order(p.detach(), skip, length)


def _initial(name: str, p: Tensor, entry: Entry, part: Part, arena: Arena) -> Tensor:
    dtype = entry.dtype
    if entry.of_blocks or not part.whole:
        zeros = arena.zeros(entry.elements(part.length), dtype, p.device)
    else:
        zeros = arena.zeros_like(p, dtype)
    if name != "master_param":
        return zeros
    return zeros.copy_(p.detach() if part.whole else _shard_of(p.detach(), p, dtype, part))


def shard_of(name: str, found: Tensor, p: Tensor, part: Part) -> Tensor:
    """Returns a part of a state tensor: `found` itself, or a copy of its part of the whole tensor."""
    if name in SCALES:
        return found if len(found) == scales_of(part.length) else part_of_scales(found, part.skip, part.length)
    return found if found.shape == (part.length,) else _shard_of(found, p, found.dtype, part)


def _shard_of(whole: Tensor, p: Tensor, dtype: torch.dtype, part: Part) -> Tensor:
    """Returns a copy of a part of a tensor, in the order of the parameter's memory."""
    in_memory = torch.empty_like(p, dtype=dtype).copy_(whole)
    return memory_order(in_memory, part.skip, part.length).clone()


class StateReader:
    """The state tensors of some parameters, which are read again only where something has replaced one.

    Args:
        members: the parameters.
        groups: all parameter groups.
        states: `Optimizer.state`; made complete for these parameters.

    Attributes:
        used: for each parameter the tensors that its update uses.
    """

    def __init__(self, members: Sequence[Member], groups: Sequence[Group], states: States) -> None:
        self._members = members
        self._read(groups, states)

    def refresh(self, groups: Sequence[Group], states: States) -> bool:
        """Reads the state again if a tensor was replaced, or its memory; returns whether one was.

        No Python code runs for each parameter, unless one was.
        """
        same = not self._members or (
            same_objects(self._all_dictionaries, states.values())
            and sum(map(len, self._dictionaries)) == len(self._values)
            and all(map(is_, self._values, chain.from_iterable(map(dict.values, self._dictionaries))))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
        )
        if not same:
            self._read(groups, states)
        return not same

    def _read(self, groups: Sequence[Group], states: States) -> None:
        arena = arena_for((m.param, groups[m.group]) for m in self._members)
        self.used = [ensure_state(states, m.param, groups[m.group], m.part, arena) for m in self._members]
        self._dictionaries = [states[m.param] for m in self._members]
        self._all_dictionaries = [*states.values()]
        self._values = [*chain.from_iterable(map(dict.values, self._dictionaries))]
        self._tensors = [t for state in self.used for t in state.values()]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))


def copy_of_states(states: States) -> dict[Any, Any]:
    """Returns a state of an optimizer whose dictionaries are copies, with the same tensors and other values."""
    return {key: {**state} if isinstance(state, dict) else state for key, state in states.items()}


def decoded_states(states: States) -> States:
    """Returns a whole state with float32 tensors in place of what is held in few bits.

    If there are any, all of Adam's tensors are copies: what is decoded does not change with the next step, either.
    """
    found = {
        key: decoded(state, key)
        for key, state in states.items()
        if isinstance(key, Tensor) and is_adams_state(state) and is_in_few_bits(state, key)
    }
    if not found:
        return states
    return {
        key: _copied(state, found.get(key)) if is_adams_state(state) else state for key, state in states.items()
    }


def _copied(state: State, decoded: dict[str, Any] | None) -> dict[str, Any]:
    """Returns a state, decoded if it is given so, with copies of Adam's tensors that it shares with the other."""
    copied = dict(state if decoded is None else decoded)
    for name in {"step", *STATE_NAMES} & copied.keys():
        if isinstance(copied[name], Tensor) and copied[name] is state.get(name):
            copied[name] = copied[name].clone()
    return copied


def without_other_formats(loaded: dict[str, Any], copied: State) -> dict[str, Any]:
    """Returns a loaded state without the tensors that `copied` holds in another format."""
    if not IN_FEW_BITS & {*loaded, *copied}:
        return loaded
    return {key: value for key, value in loaded.items() if key in copied or key not in STATE_NAMES}


def complete_loaded_groups(loaded: list[Group], own: list[Group], options: Iterable[str]) -> None:
    """Fills in options that loaded parameter groups lack, with this optimizer's values, and makes betas floats.

    Args:
        loaded: the loaded groups, changed in place.
        own: the optimizer's groups.
        options: names of all hyper-parameters, in the same order on all ranks.
    """
    for loaded_group, own_group in zip(loaded, own, strict=True):
        for option in options:
            if option in own_group:
                loaded_group.setdefault(option, own_group[option])
        loaded_group["betas"] = tuple(map(float, loaded_group["betas"]))  # PyTorch's may be tensors


def saved_states(source: dict[str, Any] | None, groups: list[Group]) -> dict[Tensor, dict[str, Any]]:
    """Returns, for each parameter, its entry in a state dictionary as it was saved.

    Args:
        source: a state dictionary that fits the groups, or None.
        groups: the optimizer's parameter groups.
    """
    if source is None:
        return {}
    numbers = [number for group in source["param_groups"] for number in group["params"]]
    params = [p for group in groups for p in group["params"]]
    saved = source["state"]
    return {p: saved[number] for number, p in zip(numbers, params, strict=True) if number in saved}


@torch.inference_mode(False)  # as the state that is created with the optimizer
@torch.no_grad()
def copy_loaded_state(p: Tensor, loaded: dict[str, Any], group: Group, arena: Arena) -> State:
    """Copies a loaded state into tensors with the strides of ``p``, and its step count to a float32 on the CPU.

    Entries that are not Adam's are the user's, and not included.
    """
    state = {"step": torch.tensor(float(loaded["step"]), dtype=torch.float32, device="cpu")}
    wanted = entries({**group, "amsgrad": "max_exp_avg_sq" in loaded}, p)
    converted = {key: value for key, value in loaded.items() if key in STATE_NAMES}
    if not fits(converted, p, wanted):
        on_device = {key: value.to(p.device) for key, value in converted.items()}
        convert(on_device, p, wanted, memory_order(p.detach(), 0, p.numel()))
        converted = on_device
    for key, entry in wanted.items():
        if key in converted and entry.of_blocks:
            state[key] = arena.zeros(entry.elements(p.numel()), entry.dtype, p.device).copy_(converted[key])
        elif key in converted:
            state[key] = arena.zeros_like(p, entry.dtype).copy_(converted[key])
    return state
