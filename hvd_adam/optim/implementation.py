"""Which implementation of the update each parameter group uses, and which kernels that needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hvd_adam.optim import fused, validation
from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.formats.choice import rounding, state_format
from hvd_adam.optim.formats.held import entries
from hvd_adam.optim.memory import is_dense, is_ordinary, is_trained
from hvd_adam.optim.optimizer_state import Group

# On a CPU "auto" uses the fused kernel from this number of elements or of tensors on. Below both a step takes a
# millisecond or two in either implementation, and compiling takes a second. For 100 tensors of 64 elements the
# fused kernel takes a seventh of the time of foreach. State in few bits is another matter: for 62 tensors of 4096
# elements a step takes 20 ms with 8-bit state, 10 ms with bfloat16 state, and less than 1 ms in the kernel.
AUTO_FUSED_ELEMENTS, AUTO_FUSED_TENSORS = 1 << 20, 64

# The options that decide about layout and kernels.
_LAYOUT_OPTIONS = ("implementation", "amsgrad", "master_weights", "stochastic_rounding", "state_format")


# What torch.optim.Adam calls its implementations, and what it can do and `Adam` cannot, with the remedy.
_NAMES_OF_TORCH = ("foreach", "fused")
_REFUSED = {
    "capturable": "learning rate and step count are numbers of the host; capture forward and backward only, with "
    "capturable=False, and call step() after each replay",
    "differentiable": "step() changes the parameters in place and is not recorded; use torch.optim.Adam to "
    "differentiate through an update",
}


def choose_implementation(implementation: str, choices: Mapping[str, object]) -> str:
    """Returns the implementation that `implementation` and the arguments of ``torch.optim.Adam`` name together.

    Args:
        implementation: the argument of `Adam`.
        choices: values of "foreach", "fused", "capturable" and "differentiable"; missing ones are None.

    Raises:
        ValueError: they exclude each other, the implementation is unknown, or one is refused.
    """
    validation.check_implementation(implementation)
    for name, remedy in _REFUSED.items():
        if choices.get(name):
            raise ValueError(f"{name}=True is not supported: {remedy}")
    named = [name for name in _NAMES_OF_TORCH if choices.get(name)]
    if len(named) > 1:
        raise ValueError("`fused` and `foreach` cannot be `True` together.")
    if implementation == "auto":
        return named[0] if named else implementation
    for name in _NAMES_OF_TORCH:
        value = choices.get(name)
        excluded = name == implementation and value is not None and not value
        if excluded or (value and name != implementation):
            raise ValueError(f"implementation={implementation!r} and {name}={value!r} contradict: leave out one")
    return implementation


def choose_group_implementation(group: Group, defaults: Group) -> None:
    """Sets the implementation of a new group that has arguments of ``torch.optim.Adam``.

    The group's own arguments take precedence over the constructor's. In a group that has every hyper-parameter,
    such as one of another `Adam` that has loaded a state of ``torch.optim.Adam``, they have no effect.

    Args:
        group: the group, changed in place.
        defaults: the constructor's hyper-parameters.

    Raises:
        ValueError: as `choose_implementation`; the group is then unchanged.
    """
    if not isinstance(group, dict) or defaults.keys() <= group.keys():  # PyTorch refuses what is no dictionary
        return
    choices = {name: group[name] for name in (*_NAMES_OF_TORCH, *_REFUSED) if name in group}
    if not choices:
        return
    inherited = defaults["implementation"]
    overridden = any(choices.get(name) for name in _NAMES_OF_TORCH) or choices.get(inherited) is not None
    own = {"implementation": "auto" if overridden else inherited, **group}
    group["implementation"] = choose_implementation(own["implementation"], choices)


def layout_options(groups: Sequence[Group]) -> list[tuple[object, ...]]:
    """Returns what a layout depends on in the groups, but the parameters, to compare with another step's."""
    return [(*map(group.get, _LAYOUT_OPTIONS), len(group["params"])) for group in groups]


def resolve_auto(groups: Sequence[Group]) -> list[str]:
    """Returns the implementation of each group, with "auto" replaced by "fused" or "foreach"."""
    sizes = [p.numel() for group in groups for p in group["params"] if p.requires_grad]
    large_in_all = sum(sizes) >= AUTO_FUSED_ELEMENTS or len(sizes) >= AUTO_FUSED_TENSORS
    resolved = []
    for group in groups:
        implementation = group["implementation"]
        if implementation == "auto":
            wins = large_in_all or any(_wins_at_every_size(group, p) for p in group["params"])
            implementation = "fused" if wins else "foreach"
        resolved.append(implementation)
    return resolved


def _wins_at_every_size(group: Group, p: Tensor) -> bool:
    """Returns whether a kernel pays for its compilation also where there are few parameters."""
    if fused.backend(p.device.type).for_every_size:
        return True
    return is_trained(p) and can_be_fused(p) and kernel_spec(group, p).in_blocks


def without_fused(implementations: Iterable[str]) -> list[str]:
    """Returns the implementations with "fused" replaced by "foreach"."""
    return ["foreach" if name == "fused" else name for name in implementations]


def can_be_fused(p: Tensor) -> bool:
    """Returns whether a kernel can read a parameter at its address: an ordinary tensor without gaps."""
    return is_ordinary(p) and is_dense(p)


def kernel_spec(group: Group, p: Tensor) -> KernelSpec:
    """Returns the kernel that updates a parameter of the group."""
    held = state_format(group, p)
    moments = torch.float32 if held == "8bit" else entries(group, p)["exp_avg"].dtype
    return KernelSpec(p.device.type, p.dtype, moments, rounding(group, p), held)


def first_compile_error(groups: Sequence[Group], implementations: Sequence[str]) -> str | None:
    """Compiles the kernels of every fused group; returns the first error in one line, or None."""
    specs = {
        kernel_spec(group, p): None  # an ordered set
        for group, implementation in zip(groups, implementations, strict=True)
        if implementation == "fused"
        for p in group["params"]
        if is_trained(p) and can_be_fused(p)
    }
    return next((error for spec in specs if (error := fused.compile_error(spec))), None)
