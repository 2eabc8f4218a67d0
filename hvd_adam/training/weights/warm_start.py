"""Starts a model with the weights of another run (`--init-from`)."""

from __future__ import annotations

import torch

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import tensors_of
from hvd_adam.errors import UserError

MOST_NAMED = 5  # tensors that the message names


@torch.no_grad()
def warm_start(model: torch.nn.Module, path: str) -> str:
    """Loads the weights and buffers of a checkpoint whose names and shapes fit.

    The averages of a run with `--ema` are taken where the checkpoint has them.

    Args:
        model: the model; tensors that do not fit keep their values.
        path: as for `checkpoint.storage.load`.

    Returns:
        A line on what was loaded, and on what was not.

    Raises:
        UserError: the checkpoint is missing or damaged, has no weights, or none of its weights fits.
    """
    checkpoint = storage.load(path)
    saved = checkpoint.get("ema") or checkpoint.get("model")
    if not isinstance(saved, dict):
        raise UserError(f"--init-from {path} was not written by hvd_adam.train: it has no model")
    own, saved = tensors_of(model.state_dict()), tensors_of(saved)
    fitting = {name for name in own if name in saved and saved[name].shape == own[name].shape}
    if not fitting:
        difference = ", ".join(_difference(name, own, saved) for name in [*own][:1])
        raise UserError(f"--init-from {path}: no weight of it fits the model: {difference}")
    for name in fitting:
        own[name].copy_(saved[name])
    new = [_difference(name, own, saved) for name in own if name not in fitting]
    unused = [f"{name} {tuple(saved[name].shape)}" for name in saved if name not in own]
    parts = [f"{len(fitting)} of {len(own)} tensors from {path}"]
    parts += [f"{_some(new)} {'is' if len(new) == 1 else 'are'} new"] if new else []
    parts += [f"{_some(unused)} {'is' if len(unused) == 1 else 'are'} not used"] if unused else []
    return f"weights: {'; '.join(parts)}"


def _difference(name: str, own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> str:
    shape = f"{tuple(own[name].shape)}"
    return f"{name} {tuple(saved[name].shape)} -> {shape}" if name in saved else f"{name} {shape}"


def _some(names: list[str]) -> str:
    others = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {others} more" if others > 0 else "")
