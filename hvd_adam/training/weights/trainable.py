"""Which weights are trained (`--freeze`), and which of them decay (`--weight-decay-on`)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from hvd_adam.errors import UserError


def freeze(model: torch.nn.Module, patterns: str) -> None:
    """Freezes the parameters whose names match one of the patterns.

    Args:
        model: its parameters get `requires_grad=False`.
        patterns: separated by commas, as in "conv1.*,layer1.*"; see the module fnmatch.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in (part.strip() for part in patterns.split(",")):
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(f"--freeze {pattern} matches no parameter: use names such as {_examples(parameters)}")
        for name in matching:
            parameters[name].requires_grad = False  # the method is refused for parameters without a shape yet
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--freeze {patterns} matches every parameter: leave some to train")


def _examples(names: dict[str, Any]) -> str:
    shown = list(names)
    return ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", *shown[-2:]])


def keep_frozen_statistics(model: torch.nn.Module) -> None:
    """Sets normalizations with running statistics to evaluation mode if all their parameters are frozen.

    Otherwise the running means of a frozen layer would follow the new data, and its outputs would change. Call it
    after `model.train()`.
    """
    for layer in model.modules():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, _NormBase) and own and not any(parameter.requires_grad for parameter in own):
            layer.eval()


def parameter_groups(model: torch.nn.Module, weight_decay_on: str) -> list[dict[str, Any]]:
    """Returns the parameter groups for Adam.

    Args:
        model: the model.
        weight_decay_on: "all": one group. "matrices": tensors with fewer than two dimensions, such as biases and
            the weights of normalizations, are a second group without weight decay.
    """
    parameters = list(model.parameters())
    if weight_decay_on == "all":
        return [{"params": parameters}]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
