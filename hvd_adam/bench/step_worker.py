"""A rank of `bench step`: whole training steps of each variant, each set up as its own documentation shows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hvd_adam.bench.config import DEFERRED, OURS, RELEASED
from hvd_adam.bench.interleave import Measure
from hvd_adam.bench.launchers import COLLECTIVE_TIMEOUT_SECONDS
from hvd_adam.bench.timer import synchronizer, time_calls
from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.context import horovod, init
from hvd_adam.distributed.launch_env import LaunchInfo
from hvd_adam.distributed.placement import keep_freed_memory
from hvd_adam.models import zoo
from hvd_adam.models.precision import autocast
from hvd_adam.optim.adam import Adam

IMAGE = (3, 32, 32)
CLASSES = 10

# So small that the weights hardly change: a memorized batch has denormal gradients and moments, which slow
# processors down.
LEARNING_RATE = 1e-6

Wrapped = tuple[nn.Module, Any]


def build_model(name: str) -> nn.Module:
    """Builds the model to train: "mlp" has many parameters and little computation; others as in `models.zoo`.

    Raises:
        UserError: there is no such model.
    """
    if name == "mlp":
        layers = (nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, CLASSES))
        return nn.Sequential(nn.Flatten(), *layers)
    return zoo.build(name, sample_shape=IMAGE, num_classes=CLASSES)


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Sets this rank up for the task's variant, and returns a function that times one turn.

    On a GPU the steps of a turn are queued back to back and synchronized once at the end: a synchronization after
    each step would prevent the host from queueing ahead, as it does in training.

    Args:
        task: "variant", "model", "batch_size", "precision", "channels_last", "compile", "device" ("cpu" or "cuda")
            and "steps" per turn.
        launch: launcher, rank and size of this process.
        folder: directory shared by the ranks.
    """
    wrap = connect(task["variant"], task["device"], launch, folder)
    device = torch.device("cpu") if task["device"] == "cpu" else torch.device("cuda", torch.cuda.current_device())
    memory_format = torch.channels_last if task["channels_last"] else torch.preserve_format
    torch.manual_seed(0)
    # torch's stubs lack the overload of Module.to with a memory format.
    model, optimizer = wrap(build_model(task["model"]).to(device, memory_format=memory_format))  # type: ignore[call-overload]
    images, labels = random_batch(task["batch_size"], launch.rank, device)
    images = images.to(memory_format=memory_format)
    forward = torch.compile(model) if task["compile"] else model
    step = training_step(forward, optimizer, images, labels, task["precision"])
    synchronize, steps = synchronizer(task["device"]), task["steps"]
    steps_per_sync = 1 if task["device"] == "cpu" else steps
    return lambda: {"step": time_calls(step, steps, synchronize, steps_per_sync)}


def connect(
    variant: str, device: str, launch: LaunchInfo, folder: Path, state_format: str = "float32"
) -> Callable[[nn.Module], Wrapped]:
    """Connects this rank with the others.

    Returns a function from a model to the distributed model and its optimizer (None for "compute").

    Variants with stock Horovod do not get the settings that `hvd_adam.init` makes.
    """
    if variant.startswith(OURS):
        init(device)
        strategy, _, compression = variant.removeprefix(OURS).removesuffix(DEFERRED).partition("-")
        options: dict[str, Any] = {"compression": compression or "none", "defer_averaging": DEFERRED in variant}
        if variant == RELEASED:
            options = {"release_gradients": True, "skip_nonfinite": False}
        wrap = functools.partial(distribute, strategy=strategy, **options)
        make = functools.partial(Adam, lr=LEARNING_RATE, state_format=state_format)
        return lambda model: (model, wrap(make(model.parameters()), model))
    if device == "cuda":
        torch.cuda.set_device(launch.rank)
    if variant == "compute":
        if device == "cpu":
            keep_freed_memory()  # as ours: otherwise it is no lower bound
        return lambda model: (model, None)
    if variant == "plain":
        return lambda model: (model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True))
    if variant.startswith("horovod"):
        horovod().init()
        return lambda model: _stock_horovod(model, fused=variant == "horovod-fused")
    start_process_group(device, launch, folder)
    return _ddp_zero if variant == "ddp-zero" else _ddp_fused


def start_process_group(device: str, launch: LaunchInfo, folder: Path) -> None:
    """Starts torch.distributed with a rendezvous file in the group's directory."""
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=launch.rank,
        world_size=launch.size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS),
    )


def random_batch(size: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 images of shape (size, *IMAGE) and labels of shape (size,) on the device, seeded by rank."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(size, *IMAGE, generator=generator).to(device)
    return images, torch.randint(CLASSES, (size,), generator=generator).to(device)


def training_step(
    model: Callable[..., Any], optimizer: Any, images: torch.Tensor, labels: torch.Tensor, precision: str = "fp32"
) -> Callable[[], None]:
    """Returns a function that makes one training step on a batch that is on the device already.

    Args:
        model: the model, distributed and, if wanted, compiled.
        optimizer: distributes its gradients and updates it; None for no update.
        images: images of the batch.
        labels: labels of the batch.
        precision: as in `hvd_adam.models.precision.autocast`.
    """
    gradients: Any = optimizer or model

    def step() -> None:
        gradients.zero_grad()
        with autocast(precision, images.device):
            logits = model(images)
        loss: Any = F.cross_entropy(logits.float(), labels)
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def _stock_horovod(model: nn.Module, fused: bool) -> Wrapped:
    """As in Horovod's examples, with torch.optim.Adam's default or fused implementation."""
    hvd = horovod()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=fused or None)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def _ddp_fused(model: nn.Module) -> Wrapped:
    model = nn.parallel.DistributedDataParallel(model)
    return model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)


def _ddp_zero(model: nn.Module) -> Wrapped:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # optional: a torch without distributed has none

    model = nn.parallel.DistributedDataParallel(model)
    options: dict[str, Any] = {"lr": LEARNING_RATE, "fused": True}
    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, **options)
