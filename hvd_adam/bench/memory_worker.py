"""A rank of `bench memory`: the bytes of what a training step keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_adam.bench.config import OURS
from hvd_adam.bench.interleave import Measure
from hvd_adam.bench.step_worker import build_model, connect, random_batch, training_step
from hvd_adam.distributed.context import init
from hvd_adam.distributed.launch_env import LaunchInfo

STEPS = 3
BATCH_SIZE = 4


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Makes this rank one that trains with the task's "strategy" its "model" on "device"."""
    wrap = connect(OURS + task["strategy"], task["device"], launch, folder)
    device = init().device
    model, optimizer = wrap(build_model(task["model"]).to(device))
    step = training_step(model, optimizer, *random_batch(BATCH_SIZE, launch.rank, device))

    def measure() -> dict[str, list[float]]:
        for _ in range(STEPS):
            step()
        return {name: [size] for name, size in kept(model, optimizer).items()}

    return measure


def kept(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of parameters, gradients and the optimizer's state on this rank, and of all together.

    What several tensors share is counted once; a tensor that is part of a larger buffer keeps the whole of it.
    """
    parameters = list(model.parameters())
    parts = {
        "parameters": _storages(parameters),
        "gradients": _storages(p.grad for p in parameters if p.grad is not None),
        "state": _storages(_tensors(optimizer.state)),
    }
    everything = {address: size for storages in parts.values() for address, size in storages.items()}
    return {name: sum(part.values()) for name, part in (*parts.items(), ("total", everything))}


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Every tensor inside dictionaries and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
