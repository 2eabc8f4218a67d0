"""Evaluation of a model on the whole test set, and loading of models from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import require_same_tensors
from hvd_adam.config import DataConfig, EvaluateConfig
from hvd_adam.config.effects import reads_files
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.protocols import Loader
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import Cluster, init
from hvd_adam.errors import UserError
from hvd_adam.log import write_result
from hvd_adam.models import zoo
from hvd_adam.training.builders import load_images
from hvd_adam.training.precision import autocast, parameter_dtype

Forward = Callable[[torch.Tensor], torch.Tensor]

# The largest number of classes with a confusion matrix: more are neither readable nor small in `metrics.jsonl`.
CONFUSION_CLASSES = 50


@dataclass(frozen=True)
class Scores:
    """Averages over the whole test set.

    Attributes:
        test_loss: mean cross-entropy, in nats.
        test_accuracy: fraction of images classified correctly, in [0, 1].
        test_balanced_accuracy: mean over the classes of their accuracy, in [0, 1].
        images: number of images evaluated.
        confusion: number of images by true class (rows) and predicted class (columns); None with more than
            `CONFUSION_CLASSES` classes.
    """

    test_loss: float
    test_accuracy: float
    test_balanced_accuracy: float
    images: int
    confusion: list[list[int]] | None = None


@torch.inference_mode()
def score(forward: Forward, loader: Loader, cluster: Cluster, batch_size: int = 256) -> Scores:
    """Evaluates every test image exactly once over all ranks; every rank must call it.

    Args:
        forward: maps images (n, c, h, w) to logits (n, classes). The caller sets the model to evaluation mode.
        loader: this rank's batches.
        cluster: this process.
        batch_size: images per rank and batch.

    Returns:
        The scores, identical on all ranks.
    """
    classes = len(loader.data.classes)
    cells = classes**2 if classes <= CONFUSION_CLASSES else 0
    sums = torch.zeros(1 + 2 * classes + cells, dtype=torch.float64, device=cluster.device)
    loss, correct, seen, pairs = torch.split(sums, [1, classes, classes, cells])
    for images, labels in loader.test_batches(batch_size, rank=cluster.rank, size=cluster.size):
        logits = forward(images).to(loader.dtype)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        predicted = logits.argmax(dim=1)
        correct += torch.bincount(labels[predicted == labels], minlength=classes)
        seen += torch.bincount(labels, minlength=classes)
        if cells:  # a model may have more outputs than there are classes
            known = predicted < classes
            pairs += torch.bincount((classes * labels + predicted)[known], minlength=cells)
    loss_sum, *counts = cluster.sum(sums).tolist()
    hits, totals, flat = counts[:classes], counts[classes : 2 * classes], list(map(int, counts[2 * classes :]))
    recalls = [hit / total for hit, total in zip(hits, totals, strict=True) if total]
    images_seen = sum(totals)
    matrix = [flat[start : start + classes] for start in range(0, cells, classes)] or None
    balanced_accuracy = sum(recalls) / len(recalls)
    return Scores(loss_sum / images_seen, sum(hits) / images_seen, balanced_accuracy, int(images_seen), matrix)


def evaluate(config: EvaluateConfig) -> None:
    """Runs `python -m hvd_adam.evaluate` on this rank."""
    cluster = init(config.device)
    require_same(cluster, "arguments", asdict(config))
    with raise_on_all_ranks(cluster):
        try:
            checkpoint = storage.resolve(config.checkpoint, config.which)
        except UserError as error:
            raise UserError(f"--which {error}" if str(error).startswith("best ") else str(error)) from None
        forward, loader = load_model(replace(config, checkpoint=str(checkpoint)), cluster)
    scores = score(forward, loader, cluster, config.batch_size)
    if cluster.rank == 0:
        write_result(_report(scores, loader.data.name, checkpoint, config.json) + "\n")


def load_model(config: EvaluateConfig, cluster: Cluster) -> tuple[Forward, Loader]:
    """Loads a checkpoint's model, and the test images with the normalization of the training.

    Returns:
        The forward pass of the model in evaluation mode, and the loader.

    Raises:
        UserError: the checkpoint is missing or damaged, its model or data set cannot be built, or the two do not
            fit together.
    """
    state = storage.load(config.checkpoint)
    try:
        trained, data, weights = state["config"], state["data"], state["model"]
    except KeyError as error:
        raise UserError(f"checkpoint {config.checkpoint} was not written by hvd_adam.train: no {error}") from None
    images = load_images(_data_config(config, trained))
    if list(images.classes) != data["classes"]:
        raise UserError(
            f"checkpoint {config.checkpoint} is of another model or data set: its classes are {data['classes']}, "
            f"those of {images.name} {list(images.classes)}"
        )
    model: torch.nn.Module = zoo.build(
        trained["model"],
        in_channels=images.channels,
        num_classes=len(images.classes),
        image_size=images.image_size,
        dropout=trained["dropout"],
    )
    require_same_tensors(model.state_dict(), weights, config.checkpoint)
    model.load_state_dict(weights)
    dtype = parameter_dtype(trained["precision"])
    model.to(cluster.device, dtype).eval()

    def forward(batch: torch.Tensor) -> torch.Tensor:
        with autocast(trained["precision"], cluster.device):
            logits: torch.Tensor = model(batch)
        return logits

    mean, std = tuple(data["mean"]), tuple(data["std"])
    return forward, DeviceLoader(images, cluster.device, dtype=dtype, mean=mean, std=std)


def _data_config(config: EvaluateConfig, trained: dict[str, Any]) -> DataConfig:
    """Returns the training's data options, with those that are given for the evaluation replaced."""
    dataset = config.dataset or trained["dataset"]
    if config.data_dir is not None and not reads_files(dataset):
        raise UserError(
            f"--data-dir {config.data_dir} has no effect: {dataset} is not read from files; leave the option out"
        )
    values = {item.name: trained[item.name] for item in fields(DataConfig)}
    given = {"dataset": config.dataset, "data_dir": config.data_dir}
    return DataConfig(**values | {name: value for name, value in given.items() if value is not None})


def _report(scores: Scores, name: str, checkpoint: Path, as_json: bool) -> str:
    """Returns the scores of a checkpoint on data set `name` as JSON or as lines of text."""
    if as_json:
        return json.dumps({**asdict(scores), "checkpoint": str(checkpoint)})
    return (
        f"checkpoint {checkpoint}\ntest images {scores.images} of {name}\ntest loss {scores.test_loss:.4f}\n"
        f"test accuracy {scores.test_accuracy:.4f}\ntest balanced accuracy {scores.test_balanced_accuracy:.4f}"
    )
