"""What `Adam` refuses, with the messages of ``torch.optim.Adam`` wherever that refuses it too."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hvd_adam.optim.formats.choice import STATE_FORMATS
from hvd_adam.optim.formats.eight_bit import scales_of
from hvd_adam.optim.formats.held import FIRST_CODES, SCALES, SECOND_CODES
from hvd_adam.optim.optimizer_state import REQUIRED_STATE, STATE_NAMES, Group, is_adams_state

IMPLEMENTATIONS = ("reference", "foreach", "fused", "auto")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
_CODES = ("exp_avg_codes", "exp_avg_sq_codes", "param_correction")
_NUMBERS = (float, Real, Tensor)  # the commonest first: every step checks
_PAIRS = (("exp_avg", "exp_avg_sq"), (FIRST_CODES[0], SECOND_CODES[0]))


def check_hyper_parameters(group: Group) -> None:
    """Checks the hyper-parameters of a group.

    Raises:
        ValueError: one is out of range.
        TypeError: one is no number.
    """
    lr, betas = group["lr"], group["betas"]
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, group[name])
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas is {betas!r}; it must be two numbers, such as (0.9, 0.999)")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not group["eps"] >= 0.0:
        raise ValueError(f"Invalid epsilon value: {group['eps']}")
    if len(betas) != 2 or not any(all(isinstance(beta, kind) for beta in betas) for kind in (float, Tensor)):
        raise ValueError(f"betas must be two floats, or two tensors, but got {betas}")
    if any(isinstance(beta, Tensor) and beta.numel() != 1 for beta in betas):
        raise ValueError(f"Tensor betas must be 1-element, but are {betas}")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not group["weight_decay"] >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    check_format(group)
    check_implementation(group["implementation"])


def check_number(name: str, value: object) -> None:
    """Checks the value of a hyper-parameter.

    Raises:
        ValueError: it is a tensor of several elements.
        TypeError: it is no number.
    """
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, but has {value.numel()} elements")


def check_format(group: Group) -> None:
    """Checks the options that decide how the state of a group is held.

    Raises:
        ValueError: one is unknown, or they exclude each other.
    """
    if group["master_weights"] not in (False, True, "8bit"):
        raise ValueError(
            f"master_weights={group['master_weights']!r} is unknown, choose one of False, True, '8bit'"
        )
    if group["master_weights"] and group["stochastic_rounding"]:
        raise ValueError("master_weights and stochastic_rounding exclude each other: use one of them")
    if group["state_format"] not in STATE_FORMATS:
        choices = ", ".join(map(repr, STATE_FORMATS))
        raise ValueError(f"state_format={group['state_format']!r} is unknown, choose one of {choices}")
    if group["amsgrad"] and group["state_format"] != "float32":
        raise ValueError(
            f"state_format={group['state_format']!r} and amsgrad exclude each other: the largest of many rounded "
            "moments grows with their rounding errors"
        )


def check_implementation(implementation: object) -> None:
    """Checks the name of an implementation.

    Raises:
        ValueError: it is not one of IMPLEMENTATIONS.
    """
    if implementation not in IMPLEMENTATIONS:
        choices = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is unknown, choose one of {choices}")


def check_parameters(params: list[Tensor]) -> None:
    """Checks that parameters have a shape, and that trained ones are dense, real and not lazily negated.

    Raises:
        ValueError: one is uninitialized, sparse, complex, or a view with the negative bit.
    """
    for i, p in enumerate(params):
        if is_lazy(p):
            raise ValueError(
                f"Adam needs the shapes of all parameters, but parameter {i} is of a lazy module: run one batch "
                "through the model before the optimizer is built"
            )
        if not p.requires_grad and p.grad is None:
            continue
        if p.layout != torch.strided:
            raise ValueError(f"Adam does not support sparse parameters, but parameter {i} is {p.layout}")
        if p.is_complex():
            raise ValueError(f"Adam does not support complex parameters, but parameter {i} is {p.dtype}")
        if p.is_neg():  # PyTorch's updates of lists fail, after other parameters have been changed
            raise ValueError(
                f"Adam does not support parameters with the negative bit, but parameter {i} is a view such as "
                "z.conj().imag: use torch.nn.Parameter(view.resolve_neg())"
            )


def check_gradient(p: Tensor) -> None:
    """Checks that a parameter's gradient, which must not be None, can be used.

    Raises:
        RuntimeError: it is sparse or not of the parameter's dtype.
    """
    assert p.grad is not None
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            "Adam does not support sparse gradients: use Embedding(…, sparse=False), or torch.optim.SparseAdam"
        )
    if p.grad.dtype != p.dtype:
        raise RuntimeError(f"Adam needs gradients of the parameter's {p.dtype}, but got {p.grad.dtype}")


def refuse_graph_capture() -> None:
    """Checks that the current CUDA stream is not capturing a graph.

    Raises:
        RuntimeError: it is.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Adam's step cannot be captured in a CUDA graph: learning rate and step count are numbers of the "
            "host, and every replay would repeat their present values; capture forward and backward only, and "
            "call step() after each replay"
        )


def check_loaded_state(state: dict[str, Any]) -> None:
    """Checks loaded groups and state, which PyTorch would accept unchecked and fail on later.

    Args:
        state: what `Optimizer.load_state_dict` passes to `__setstate__`, with parameters as keys.

    Raises:
        ValueError: an implementation is unknown, or the state is not Adam's or does not fit the parameters.
    """
    for group in state["param_groups"]:
        check_implementation(group["implementation"])
        check_format(group)
    params = [p for group in state["param_groups"] for p in group["params"]]
    some_is_adams = any(is_adams_state(state["state"].get(p)) for p in params)
    for i, p in enumerate(params):
        loaded = state["state"].get(p)
        if not loaded or (some_is_adams and not any(key in loaded for key in REQUIRED_STATE)):
            continue  # the user's own entries
        missing = [key for key in REQUIRED_STATE if key not in loaded and f"{key}_codes" not in loaded]
        missing += [key for codes, key in (FIRST_CODES, SECOND_CODES) if codes in loaded and key not in loaded]
        if missing:
            raise ValueError(f"loaded state of parameter {i} is not Adam's: {missing[0]} is missing")
        if any(first in loaded and second not in loaded for first, second in _PAIRS):
            raise ValueError(f"loaded moments of parameter {i} have two formats: save both in one")
        for key in loaded.keys() & {*STATE_NAMES}:
            if not isinstance(loaded[key], Tensor) or loaded[key].layout != torch.strided:
                kind = type(loaded[key]).__name__
                raise ValueError(f"loaded {key} of parameter {i} must be a dense tensor, but is a {kind}")
        for key in (*_MOMENTS, *_CODES):
            if key in loaded and loaded[key].shape != p.shape:
                raise ValueError(
                    f"loaded {key} of parameter {i} has shape {tuple(loaded[key].shape)}, "
                    f"but the parameter has shape {tuple(p.shape)}"
                )
        for key in SCALES & loaded.keys():
            if loaded[key].shape != (scales_of(p.numel()),):
                raise ValueError(
                    f"loaded {key} of parameter {i} has shape {tuple(loaded[key].shape)}, "
                    f"but {p.numel()} elements have {scales_of(p.numel())} scales"
                )
        step = torch.as_tensor(loaded["step"], device="cpu")
        if step.numel() != 1 or not step.item() >= 0:
            raise ValueError(f"loaded step of parameter {i} must be one count of at least 0, but is {step}")
