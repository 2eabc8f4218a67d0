"""What `Adam` refuses, in the words of ``torch.optim.Adam`` wherever that refuses it too."""

from typing import Any

import torch
from torch import Tensor

from hvd_adam.optim.functional import Group

IMPLEMENTATIONS = ("reference", "foreach", "fused", "auto")
_ALWAYS_KEPT = ("step", "exp_avg", "exp_avg_sq")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def check_hyper_parameters(group: Group) -> None:
    """Refuses hyper-parameters out of range."""
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but has {lr.numel()} elements")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if len(betas) != 2 or not all(isinstance(beta, float) for beta in betas):
        raise ValueError(f"betas must be two floats, but got {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError("master_weights and stochastic_rounding exclude each other: give one")
    check_implementation(group["implementation"])


def check_implementation(implementation: object) -> None:
    """Refuses what is not one of IMPLEMENTATIONS."""
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is unknown, choose one of {choices}")


def check_parameters(params: list[Tensor]) -> None:
    """Refuses sparse and complex parameters."""
    for i, p in enumerate(params):
        if p.layout != torch.strided:
            raise ValueError(f"Adam does not support sparse parameters, but parameter {i} is {p.layout}")
        if p.is_complex():
            raise ValueError(f"Adam does not support complex parameters, but parameter {i} is {p.dtype}")


def check_loaded_state(state: dict[str, Any]) -> None:
    """Refuses state that is not Adam's or does not fit; PyTorch itself would take it and fail later."""
    params = [p for group in state["param_groups"] for p in group["params"]]
    for i, p in enumerate(params):
        loaded = state["state"].get(p)
        if not loaded:
            continue
        missing = [key for key in _ALWAYS_KEPT if key not in loaded]
        if missing:
            raise ValueError(f"loaded state of parameter {i} is not Adam's: {missing[0]} is missing")
        for key in _MOMENTS:
            if key in loaded and loaded[key].shape != p.shape:
                raise ValueError(
                    f"loaded {key} of parameter {i} has shape {tuple(loaded[key].shape)}, "
                    f"but the parameter has shape {tuple(p.shape)}"
                )
        step = torch.as_tensor(loaded["step"])
        if step.numel() != 1 or not step.item() >= 0:
            raise ValueError(f"loaded step of parameter {i} must be one count of at least 0, but is {step}")
