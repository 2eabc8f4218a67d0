"""Which implementation of the update each parameter group uses, and which kernels that needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hvd_adam.optim import fused
from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.optimizer_state import Group, moment_dtype, rounding

# On a CPU "auto" uses the fused kernel from this number of elements on. Below it a step takes a millisecond or two
# in either implementation, and compiling takes seconds.
AUTO_FUSED_ELEMENTS = 1 << 20

# The options that decide about layout and kernels.
_LAYOUT_OPTIONS = ("implementation", "amsgrad", "decoupled_weight_decay", "master_weights", "stochastic_rounding")


def layout_signature(groups: Sequence[Group]) -> list[tuple[object, ...]]:
    """Returns everything in the groups that a layout and its kernels depend on, to compare with another step's."""
    return [
        (*map(group.get, _LAYOUT_OPTIONS), group["weight_decay"] != 0, *map(id, group["params"]))
        for group in groups
    ]


def resolve_auto(groups: Sequence[Group]) -> list[str]:
    """Returns the implementation of each group, with "auto" replaced by "fused" or "foreach"."""
    elements = sum(p.numel() for group in groups for p in group["params"])
    resolved = []
    for group in groups:
        implementation = group["implementation"]
        if implementation == "auto":
            large = elements >= AUTO_FUSED_ELEMENTS or any(
                fused.backend(p.device.type).for_every_size for p in group["params"]
            )
            implementation = "fused" if large else "foreach"
        resolved.append(implementation)
    return resolved


def without_fused(implementations: Iterable[str]) -> list[str]:
    """Returns the implementations with "fused" replaced by "foreach"."""
    return ["foreach" if name == "fused" else name for name in implementations]


def kernel_spec(group: Group, device: torch.device, dtype: torch.dtype) -> KernelSpec:
    """Returns the kernel that updates the group's parameters of this device and dtype."""
    coupling = "decoupled" if group["decoupled_weight_decay"] else "coupled"
    return KernelSpec(
        device=device.type,
        dtype=dtype,
        moment_dtype=moment_dtype(group, dtype),
        amsgrad=group["amsgrad"],
        decay=coupling if group["weight_decay"] != 0 else "none",
        rounding=rounding(group, dtype),
    )


def first_compile_error(groups: Sequence[Group], implementations: Sequence[str]) -> str | None:
    """Compiles the kernels of every fused group; returns the first error in one line, or None."""
    specs = {
        kernel_spec(group, p.device, p.dtype): None  # an ordered set
        for group, implementation in zip(groups, implementations, strict=True)
        if implementation == "fused"
        for p in group["params"]
    }
    return next((error for spec in specs if (error := fused.compile_error(spec))), None)
