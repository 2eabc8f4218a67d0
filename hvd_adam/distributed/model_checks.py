"""Models, and values of options, that `distribute` refuses, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch

from hvd_adam.distributed.broadcast.tensors import distinct
from hvd_adam.errors import UserError
from hvd_adam.optim.memory import overlaps_itself

_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)


def require_parameters_of(model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a model has all parameters of an optimizer: only those would be broadcast under a name.

    Raises:
        UserError: it lacks one.
    """
    known = set(model.parameters())
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            if p not in known:
                raise UserError(
                    f"parameter {j} of group {i}, of shape {tuple(p.shape)}, is not one of the model's: give "
                    "distribute() the model that the optimizer was built for, or with parameters outside of it, "
                    "such as a loss's, torch.nn.ModuleList([model, loss])"
                )


def require_one_device(model: torch.nn.Module) -> None:
    """Checks that the parameters of a model, which has those of the optimizer, are on one device.

    Raises:
        UserError: they are not.
    """
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise UserError(
            f"the parameters are on several devices ({', '.join(devices)}); move the model to one, "
            "model.to(cluster.device), before Adam is built"
        )


def require_copyable(model: torch.nn.Module) -> None:
    """Checks that all tensors of a model can be copied from rank 0 to the others. For several ranks.

    Raises:
        UserError: one cannot.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.layout != torch.strided:
            raise UserError(f"{name} is {tensor.layout}, which cannot be copied to all ranks: use a dense tensor")
        if overlaps_itself(distinct(tensor)):
            raise UserError(
                f"{name} has elements that share memory, and cannot be copied to all ranks: use a copy, "
                f"{name}.clone()"
            )
        if tensor.requires_grad and tensor.is_inference():
            raise UserError(
                f"{name} was created in torch.inference_mode() and cannot be trained: create the model outside it"
            )


def require_unchanged_by_forward(model: torch.nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Checks that forward passes leave parameters as they are. For several ranks.

    Raises:
        UserError: an embedding with `max_norm` changes one.
    """
    trained = set(parameters)
    for name, module in model.named_modules():
        if isinstance(module, _EMBEDDINGS) and module.max_norm is not None and module.weight in trained:
            weight = f"{name}.weight" if name else "weight"
            raise UserError(
                f"{weight} has max_norm={module.max_norm:g}: forward changes the rows that this rank's batch "
                "uses, so the ranks would part. Leave max_norm out, and shorten all rows on every rank after "
                "step(), under torch.no_grad(): "
                f"module.weight.renorm_({module.norm_type:g}, 0, {module.max_norm:g})"
            )


def parameter_of(item: Any) -> Any:
    """Returns the parameter of an item of a group: PyTorch takes (name, parameter) pairs, too."""
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def in_order(params: Any) -> list[Any]:
    """Returns the items of a group that `add_param_group` takes.

    Raises:
        TypeError: they have no order, identical on all ranks.
    """
    if isinstance(params, set):
        raise TypeError("the parameters of a group must be in order, identical on all ranks: a set has none")
    return [params] if isinstance(params, torch.Tensor) else list(params)


def refuse_own_gradients(items: Iterable[Any]) -> None:
    """Refuses to add parameters that have gradients of this rank alone, where others have been averaged."""
    if any(isinstance(p, torch.Tensor) and p.grad is not None for p in map(parameter_of, items)):
        raise RuntimeError(
            "add_param_group() between backward() and step(): the added parameters have gradients of this rank "
            "alone; call it before backward() or after step()"
        )


def parameter_names(model: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[torch.Tensor, str]:
    """Returns a name for every parameter of an optimizer: the model's, where it has one."""
    names = {p: f"param_groups.{i}.{j}" for i, group in enumerate(groups) for j, p in enumerate(group["params"])}
    return names | {p: name for name, p in model.named_parameters() if p in names}


def require_whole(name: str, value: object, otherwise: str = "") -> None:
    """Checks an option that is a whole number ≥ 1.

    Args:
        name: of the option.
        value: its value.
        otherwise: other values that the option may have, for the message.

    Raises:
        UserError: it is not; booleans are not numbers.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number ≥ 1{otherwise}")


def require_positive(name: str, value: object, *, finite: bool = True) -> None:
    """Checks an option that is a number above 0.

    Args:
        name: of the option.
        value: its value.
        finite: infinity is refused, too.

    Raises:
        UserError: it is not; booleans are not numbers.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not number > 0 or (finite and number == math.inf):
        raise UserError(f"{name} is {value!r}; it must be a number > 0")
