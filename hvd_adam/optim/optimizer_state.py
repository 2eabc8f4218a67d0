"""The state tensors of each parameter: their names, dtypes and initial values, and how they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
STATE_NAMES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")


def is_adams_state(state: Any) -> bool:
    """Returns whether an entry of `Optimizer.state` has what every state of Adam has."""
    return isinstance(state, dict) and all(key in state for key in REQUIRED_STATE)


def rounding(group: Group, dtype: torch.dtype) -> str:
    """Returns how parameters of this dtype are stored: "nearest", "master" or "stochastic"."""
    if group["master_weights"] and dtype in (torch.float16, torch.bfloat16):
        return "master"
    return "stochastic" if group["stochastic_rounding"] and dtype == torch.bfloat16 else "nearest"


def moment_dtype(group: Group, dtype: torch.dtype) -> torch.dtype:
    """Returns the parameters' own dtype, as in PyTorch; float32 with master weights or stochastic rounding."""
    return dtype if rounding(group, dtype) == "nearest" else torch.float32


def state_dtypes(group: Group, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the dtype of each state tensor of a parameter of this dtype; "step" is not included."""
    moments = moment_dtype(group, dtype)
    dtypes = {"exp_avg": moments, "exp_avg_sq": moments}
    if group["amsgrad"]:
        dtypes["max_exp_avg_sq"] = moments
    if rounding(group, dtype) == "master":
        dtypes["master_param"] = torch.float32
    return dtypes


def arena_for(params: Iterable[tuple[Tensor, Group]]) -> Arena:
    """Returns memory for the whole state of some parameters, given with their groups."""
    sizes = ((p.numel(), state_dtypes(group, p.dtype).values()) for p, group in params)
    return Arena(sum(n * dtype.itemsize + Arena.GAP for n, dtypes in sizes for dtype in dtypes))


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
    for name, dtype in state_dtypes(group, p.dtype).items():
        if name not in state:
            state[name] = _initial(name, p, dtype, part, arena)
        found = state[name]
        shape, strides = (p.shape, dense.stride()) if part.whole else ((part.length,), (1,))
        if found.shape != shape and found.shape != p.shape:
            raise RuntimeError(
                f"{name} has shape {tuple(found.shape)}, but its parameter has shape {tuple(p.shape)}"
            )
        if found.shape != shape:
            state[name] = shard_of(found, p, dtype, part)
        elif (found.dtype, found.device, found.stride()) != (dtype, p.device, strides) or found.is_neg():
            state[name] = torch.empty_strided(shape, strides, dtype=dtype, device=p.device).copy_(found)
        used[name] = state[name]
    return used


def _step_count(found: Any) -> Tensor:
    """Returns a step count as the update needs it: float32, 0-dimensional, on the CPU."""
    if isinstance(found, Tensor) and found.is_cpu and found.dtype == torch.float32 and found.dim() == 0:
        return found
    return torch.tensor(0.0 if found is None else float(found), dtype=torch.float32, device="cpu")


def _initial(name: str, p: Tensor, dtype: torch.dtype, part: Part, arena: Arena) -> Tensor:
    zeros = arena.zeros_like(p, dtype) if part.whole else arena.zeros(part.length, dtype, p.device)
    if name != "master_param":
        return zeros
    return zeros.copy_(p.detach() if part.whole else shard_of(p.detach(), p, dtype, part))


def shard_of(whole: Tensor, p: Tensor, dtype: torch.dtype, part: Part) -> Tensor:
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
    dtypes = state_dtypes({**group, "amsgrad": "max_exp_avg_sq" in loaded}, p.dtype)
    for key, dtype in dtypes.items():
        if key in loaded:
            state[key] = arena.zeros_like(p, dtype).copy_(loaded[key])
    return state
