"""The state tensors of each parameter: their names, dtypes and initial values, and how they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Tensor]


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


def ensure_state(states: MutableMapping[Tensor, Any], p: Tensor, group: Group) -> State:
    """Returns the complete state of a parameter; creates missing tensors and converts those of another dtype.

    Args:
        states: `Optimizer.state`, a defaultdict.
        p: the parameter; its state tensors have its shape and strides.
        group: its parameter group.
    """
    state: State = states[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    for name, dtype in state_dtypes(group, p.dtype).items():
        if name not in state:
            initial = p.detach() if name == "master_param" else torch.zeros_like(p, dtype=dtype)
            state[name] = initial.to(dtype)
        elif state[name].dtype != dtype:  # an option has changed since
            state[name] = state[name].to(dtype)
    return state


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


def copy_loaded_state(p: Tensor, loaded: dict[str, Any], group: Group) -> State:
    """Copies a loaded state into tensors with the strides of ``p``, and its step count to a float32 on the CPU."""
    state = {"step": torch.tensor(float(loaded["step"]), dtype=torch.float32, device="cpu")}
    dtypes = state_dtypes({**group, "amsgrad": "max_exp_avg_sq" in loaded}, p.dtype)
    for key, dtype in dtypes.items():
        if key in loaded:
            state[key] = torch.empty_like(p, dtype=dtype).copy_(loaded[key])
    return state
