"""A rank of `bench memory`: counts the bytes held between training steps, and gradients in one."""

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
    """Returns a function that trains `STEPS` steps, counts the bytes held after them, and gradients in them.

    Args:
        task: "strategy", "state_format", "model" and "device".
        launch: launcher, rank and size of this process.
        folder: directory shared by the ranks.
    """
    wrap = connect(OURS + task["strategy"], task["device"], launch, folder, task["state_format"])
    device = init().device
    model = build_model(task["model"]).to(device)
    optimizers: list[Any] = []
    in_backward = _gradients_in_backward(model, optimizers)
    model, optimizer = wrap(model)
    optimizers.append(optimizer)
    step = training_step(model, optimizer, *random_batch(BATCH_SIZE, launch.rank, device))

    def measure() -> dict[str, list[float]]:
        for _ in range(STEPS):
            step()
        return {name: [size] for name, size in (*held_bytes(model, optimizer).items(), ("peak", max(in_backward)))}

    return measure


def _gradients_in_backward(model: torch.nn.Module, optimizers: list[Any]) -> list[int]:
    """Returns a list that gets the bytes of gradients each time that backward has completed one, before its use.

    They are those of all `p.grad`, and of the buckets in flight whose gradients are released.

    Args:
        model: not yet distributed.
        optimizers: that of the model, once it exists.
    """
    parameters, found = list(model.parameters()), [0]

    def count(_: torch.Tensor) -> None:
        gradients = _storages(p.grad for p in parameters if p.grad is not None)
        found.append(sum(gradients.values()) + sum(getattr(o, "gradient_buffer_bytes", 0) for o in optimizers))

    for p in parameters:
        register: Any = p.register_post_accumulate_grad_hook  # PyTorch's is untyped
        register(count)
    return found


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Returns bytes of "parameters", "gradients", optimizer "state" and the "total" on this rank.

    Counts whole storages: a storage that several tensors share once, and all of it if a tensor is part of it.
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
    """Yields every tensor inside nested dictionaries and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
