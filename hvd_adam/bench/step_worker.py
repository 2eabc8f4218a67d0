"""A rank of `bench step`: whole training steps of ours and of the peers, each as its own manual has it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hvd_adam.bench.config import OURS
from hvd_adam.bench.interleave import Measure
from hvd_adam.bench.launchers import PATIENCE_SECONDS
from hvd_adam.bench.timer import finisher, seconds
from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.context import horovod, init
from hvd_adam.distributed.launch_env import LaunchInfo
from hvd_adam.models import zoo
from hvd_adam.optim.adam import Adam
from hvd_adam.training.precision import autocast

IMAGE = (3, 32, 32)
CLASSES = 10

# So small that the weights stay where they are: a batch learned by heart has gradients, and moments, so small
# that the processor is slow on them.
LEARNING_RATE = 1e-6

Wrapped = tuple[nn.Module, Any]


def build_model(name: str) -> nn.Module:
    """Builds the model to train: "mlp" is large and quick, so bound by communication; others as `models.zoo`.

    Raises:
        UserError: there is no such model.
    """
    if name == "mlp":
        layers = (nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, CLASSES))
        return nn.Sequential(nn.Flatten(), *layers)
    return zoo.build(name, in_channels=IMAGE[0], num_classes=CLASSES, image_size=IMAGE[1:])


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Makes this rank one of the task's variant.

    On a GPU the steps of a turn are made one after the other, and waited for once, at the end: a wait after each
    would keep the host from running ahead of the device, as it does in a training.

    Args:
        task: "variant", "model", "batch_size", "precision", "channels_last", "compile", "device" ("cpu" or "cuda")
            and "steps" of a turn.
        launch: what the launcher says of this rank.
        folder: shared by the ranks.
    """
    wrap = connect(task["variant"], task["device"], launch, folder)
    device = torch.device("cpu") if task["device"] == "cpu" else torch.device("cuda", torch.cuda.current_device())
    memory_format = torch.channels_last if task["channels_last"] else torch.preserve_format
    torch.manual_seed(0)
    model, optimizer = wrap(build_model(task["model"]).to(device, memory_format=memory_format))
    images, labels = random_batch(task["batch_size"], launch.rank, device)
    images = images.to(memory_format=memory_format)
    forward = torch.compile(model) if task["compile"] else model
    step = training_step(forward, optimizer, images, labels, task["precision"])
    finish, steps = finisher(task["device"]), task["steps"]
    return lambda: {"step": seconds(step, steps, finish, in_a_row=1 if task["device"] == "cpu" else steps)}


def connect(variant: str, device: str, launch: LaunchInfo, folder: Path) -> Callable[[nn.Module], Wrapped]:
    """Connects this rank with the others as the variant does; returns what distributes a model.

    Stock Horovod is never told what `hvd_adam.init` would tell it.
    """
    if variant.startswith(OURS):
        init(device)
        strategy = variant.removeprefix(OURS)
        return lambda model: (model, distribute(Adam(model.parameters(), LEARNING_RATE), model, strategy=strategy))
    if device == "cuda":
        torch.cuda.set_device(launch.rank)
    if variant == "compute":
        return lambda model: (model, None)
    if variant == "plain":
        return lambda model: (model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True))
    if variant.startswith("horovod"):
        horovod().init()
        return lambda model: _stock(model, fused=variant == "horovod-fused")
    start_process_group(device, launch, folder)
    return _ddp_zero if variant == "ddp-zero" else _ddp_fused


def start_process_group(device: str, launch: LaunchInfo, folder: Path) -> None:
    """Starts torch.distributed, the ranks meeting through a file of the group's folder."""
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=launch.rank,
        world_size=launch.size,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )


def random_batch(size: int, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's images, always the same, and their labels, on the device."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(size, *IMAGE, generator=generator).to(device)
    return images, torch.randint(CLASSES, (size,), generator=generator).to(device)


def training_step(
    model: nn.Module, optimizer: Any, images: torch.Tensor, labels: torch.Tensor, precision: str = "fp32"
) -> Callable[[], None]:
    """A step on one batch, which lies on the device already; without optimizer no update.

    Args:
        model: it, distributed, and compiled where that is wanted.
        optimizer: what distributes its gradients and updates it, or None.
        images: of the batch.
        labels: of the batch.
        precision: as of `hvd_adam.training.precision.autocast`.
    """

    def step() -> None:
        (optimizer or model).zero_grad()
        with autocast(precision, images.device):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def _stock(model: nn.Module, fused: bool) -> Wrapped:
    """As in Horovod's examples, with torch.optim.Adam as it is by default or fused."""
    hvd = horovod()
    options = {"fused": True} if fused else {}
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, **options)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


def _ddp_fused(model: nn.Module) -> Wrapped:
    model = nn.parallel.DistributedDataParallel(model)
    return model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)


def _ddp_zero(model: nn.Module) -> Wrapped:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # optional: a torch without distributed has none

    model = nn.parallel.DistributedDataParallel(model)
    options = {"lr": LEARNING_RATE, "fused": True}
    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, **options)
