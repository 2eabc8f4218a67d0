"""Makes one run of a comparison in this process, without any collective."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvd_adam.compare.cells import Cell, Result
from hvd_adam.compare.config import CompareConfig
from hvd_adam.compare.networks import build, weights
from hvd_adam.data import ImageData
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.protocols import Batch
from hvd_adam.data.sampling import number_of_updates
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam
from hvd_adam.schedule import LearningRateSchedule, learning_rate
from hvd_adam.training.objective import Objective
from hvd_adam.training.scores.scoring import score

MOMENTUM = 0.9  # of SGD
WEIGHT_DECAY = 0.01  # of AdamW, PyTorch's default; the others have none

_EVALUATION_BATCH = 512  # images


@dataclass(frozen=True)
class Loaders:
    """Batches on this rank's device: training and validation images, and the test images.

    Attributes:
        train: its test images are the validation images, which are not among its training images.
        test: its test images are those of the data set; normalized as the training images are.
    """

    train: DeviceLoader
    test: DeviceLoader

    @classmethod
    def of(cls, data: ImageData, device: torch.device) -> Loaders:
        """Holds every fifth training image of each class out for validation, the same in every run."""
        train = DeviceLoader(hold_out(data), device)
        test = replace(train.data, test_images=data.test_images, test_labels=data.test_labels)
        return cls(train, DeviceLoader(test, device, mean=train.mean, std=train.std))


def hold_out(data: ImageData) -> ImageData:
    """Returns the data with every fifth training image of each class as test images in place of its own.

    Raises:
        UserError: no class has five training images.
    """
    held = np.zeros(len(data.train_labels), dtype=bool)
    for label in np.unique(data.train_labels):
        held[np.flatnonzero(data.train_labels == label)[4::5]] = True
    if not held.any():
        raise UserError(
            f"data set {data.name} has {len(data.train_labels)} training images: a class needs at least 5, of "
            "which one is held out for validation"
        )
    return replace(
        data,
        train_images=data.train_images[~held],
        train_labels=data.train_labels[~held],
        test_images=data.train_images[held],
        test_labels=data.train_labels[held],
    )


def make_optimizer(cell: Cell, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer of a run: Adam, AdamW and AMSGrad are this project's, the others PyTorch's."""
    moments: dict[str, Any] = {"lr": cell.lr, "betas": cell.betas, "eps": cell.eps}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adam": lambda: Adam(parameters, **moments),
        "adamw": lambda: Adam(parameters, **moments, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=True),
        "amsgrad": lambda: Adam(parameters, **moments, amsgrad=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=cell.lr, momentum=MOMENTUM),
        "nadam": lambda: torch.optim.NAdam(parameters, **moments),
        "radam": lambda: torch.optim.RAdam(parameters, **moments),
    }
    return makers[cell.optimizer]()


@dataclass
class _Record:
    """What a run has measured so far.

    Attributes:
        curve: updates, seconds of training, validation accuracy and loss at each evaluation.
        norms: of the gradient of each layer's weights at the first and at the last update.
        seconds: spent on training so far, without evaluations.
        updates: made so far.
        diverged: the update at which the loss was found not to be finite; None otherwise.
    """

    curve: list[list[Any]] = field(default_factory=list)
    norms: list[list[float | None]] = field(default_factory=list)
    seconds: float = 0.0
    updates: int = 0
    diverged: int | None = None


def train(cell: Cell, config: CompareConfig, loaders: Loaders, beat: Callable[[], None] = lambda: None) -> Result:
    """Makes one run and returns its measurements as JSON values.

    `beat` is called before each update. Losses and accuracies are of the weights after the last update. A run
    whose loss is not finite ends at the next evaluation: its result has the update in "diverged", and None for
    values that are not finite.

    Raises:
        UserError: the model does not fit the images, or a batch has more images than there are.
    """
    model = build(cell, config.model, config.depth, loaders.train.data).to(loaders.train.device)
    optimizer = make_optimizer(cell, model.parameters())
    per_epoch = loaders.train.steps_per_epoch(cell.batch_size)
    total = number_of_updates(config.epochs, per_epoch, config.max_steps)
    schedule = LearningRateSchedule(peak=cell.lr, total_steps=total, decay=config.lr_decay)
    record = _Record()
    batches = _batches(loaders.train, cell)
    while record.updates < total and record.diverged is None:
        count = min(config.eval_every, total - record.updates)
        _train_some(count, batches, model, optimizer, schedule, record, beat)
        loss, accuracy = evaluate(model, loaders.train)
        record.curve.append([record.updates, round(record.seconds, 6), accuracy, _finite(loss)])
    record.norms.append(_gradient_norms(model))
    test_loss, test_accuracy = evaluate(model, loaders.test)
    return {
        "validation_accuracy": record.curve[-1][2],
        "validation_loss": record.curve[-1][3],
        "test_accuracy": test_accuracy,
        "test_loss": _finite(test_loss),
        "updates": record.updates,
        "seconds": record.seconds,
        "diverged": record.diverged,
        "curve": record.curve,
        "gradient_norms": record.norms,
    }


def _train_some(
    count: int,
    batches: Iterator[Batch],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LearningRateSchedule,
    record: _Record,
    beat: Callable[[], None],
) -> None:
    """Makes `count` updates."""
    start, loss = _clock(next(model.parameters()).device), torch.zeros(())
    model.train()
    for _ in range(count):
        beat()
        images, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(record.updates, schedule)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        torch.autograd.backward(loss)
        if record.updates == 0:
            record.norms.append(_gradient_norms(model))
        optimizer.step()
        record.updates += 1
    if not math.isfinite(loss.item()):  # waits for the device
        record.diverged = record.updates
    record.seconds += _clock(next(model.parameters()).device) - start


def _batches(loader: DeviceLoader, cell: Cell) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.train_batches(cell.seed, epoch, global_batch_size=cell.batch_size)
        epoch += 1


def evaluate(model: torch.nn.Module, loader: DeviceLoader) -> tuple[float, float]:
    """Returns the mean cross-entropy in nats and the accuracy on the loader's test images."""
    model.eval()
    alone = Cluster(0, 1, 0, 1, 0, 1, loader.device, "none")
    scores = score(model, loader, alone, Objective(loader.dtype, None, None, 0.0, {}), _EVALUATION_BATCH)
    assert scores.test_accuracy is not None  # `networks.build` has checked that outputs are logits
    return scores.test_loss, scores.test_accuracy


def _gradient_norms(model: torch.nn.Module) -> list[float | None]:
    return [None if weight.grad is None else _finite(weight.grad.norm().item()) for weight in weights(model)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clock(device: torch.device) -> float:
    """Returns seconds: on a CPU those that this thread has computed, which other processes do not lengthen."""
    return time.thread_time() if device.type == "cpu" else time.perf_counter()
