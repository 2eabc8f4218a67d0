"""A rank of `bench memory`: counts the bytes that are held between training steps, and at the peak of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hvd_adam.bench.config import OURS
from hvd_adam.bench.interleave import Measure
from hvd_adam.bench.step_worker import CLASSES, build_model, connect, random_batch, training_step
from hvd_adam.distributed.context import init
from hvd_adam.distributed.launch_env import LaunchInfo

STEPS = 3
BATCH_SIZE = 4


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Returns a function that trains `STEPS` steps, and counts the bytes held after them and at their peak.

    Args:
        task: "strategy", "state_format", "model" and "device".
        launch: launcher, rank and size of this process.
        folder: directory shared by the ranks.
    """
    wrap = connect(OURS + task["strategy"], task["device"], launch, folder, task["state_format"])
    device = init().device
    batch = random_batch(BATCH_SIZE, launch.rank, device)
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(batch[0][0].numel(), CLASSES)).to(device)
    training_step(*wrap(small), *batch)()  # loads what every model needs
    before = _resident_bytes("VmRSS")
    model, optimizer = wrap(build_model(task["model"]).to(device))
    step = training_step(model, optimizer, *batch)

    def measure() -> dict[str, list[float]]:
        step()
        resets = device.type == "cpu" and _reset_peak()
        for _ in range(STEPS - 1):
            step()
        peak = _resident_bytes("VmHWM") - before if resets else 0
        return {name: [size] for name, size in (*held_bytes(model, optimizer).items(), ("peak", peak))}

    return measure


def _resident_bytes(name: str) -> int:
    """Returns "VmRSS", this process's resident memory, or "VmHWM", its peak; 0 where Linux does not tell it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> bool:
    """Makes the peak of resident memory the memory of now. Returns whether the kernel does so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _resident_bytes("VmHWM") > 0


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
