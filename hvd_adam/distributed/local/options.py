"""The options of `strategy="local"`, and the models and options that it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from hvd_adam.distributed.model_checks import require_positive, require_whole
from hvd_adam.distributed.sync_batchnorm import SyncBatchNorm
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam

LOCAL = "local"
DEFAULTS = {"local_steps": 50, "outer_lr": 1.0, "outer_momentum": 0.0, "islands": None}
_DTYPES = (torch.float32, torch.float64)


def require_options(
    strategy: str, options: Mapping[str, Any], compression: str, *, defers: bool, noise: bool
) -> None:
    """Checks options of `distribute`.

    Args:
        strategy: of `distribute`.
        options: those of `DEFAULTS`.
        compression: of `distribute`.
        defers: its `defer_averaging`.
        noise: its `noise_scale` is given.

    Raises:
        UserError: an option is out of range, or has no effect with this strategy; `count_islands` checks islands.
    """
    if strategy != LOCAL:
        for name, value in options.items():
            if value != DEFAULTS[name]:
                raise UserError(f"{name}={value!r} has no effect with strategy={strategy!r}: use strategy='local'")
        return
    steps, rate, momentum, _ = (options[name] for name in DEFAULTS)
    require_whole("local_steps", steps)
    require_positive("outer_lr", rate)
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= float(momentum) < 1:
        raise UserError(f"outer_momentum is {momentum!r}; it must be in [0, 1)")
    if compression not in ("none", *CODECS):
        raise UserError(f"strategy='local' has no {compression} compression: use none, int8 or int4")
    if defers:
        raise UserError("defer_averaging has no effect with strategy='local', which averages no gradients")
    if noise:
        raise UserError("noise_scale compares gradients with their mean, which strategy='local' has not")


def require_local_model(optimizer: Adam, model: torch.nn.Module) -> None:
    """Checks that islands can train a model.

    Raises:
        UserError: they cannot; names the reason.
    """
    kinds = {p.dtype for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if len(kinds) != 1 or not kinds <= {*_DTYPES}:
        named = ", ".join(sorted(map(str, kinds))) or "none"
        raise UserError(
            f"strategy='local' needs trained parameters of one dtype, float32 or float64, not {named}: use "
            "float32 parameters, with autocast where other precisions are wanted"
        )
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            raise UserError(
                f"{name} is a SyncBatchNorm, in which all ranks wait for each other in every step: use "
                "ordinary batch normalization with strategy='local'"
            )
