"""`load_model`: a trained model from a run folder or a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hvd_adam.errors import UserError
from hvd_adam.import_path import failure
from hvd_adam.inference.classifier import ImageClassifier
from hvd_adam.inference.trained import Trained
from hvd_adam.models import zoo
from hvd_adam.models.precision import parameter_dtype

IMAGE_DIMENSIONS = 3


def load_model(
    path: str | Path, *, which: str = "newest", weights: str = "auto", device: str | torch.device = "auto"
) -> nn.Module:
    """Loads a trained model, in evaluation mode. Needs neither the data set, nor Horovod, nor a launcher.

    A model of one's own (`--model package.module:function`) is imported and built as in the training.

    Args:
        path: run folder, its checkpoints folder or one checkpoint.
        which: "newest" or "best" (on the test set): of a run folder, the checkpoint to load.
        weights: "ema": the moving average of `--ema`; "model": the weights themselves; "auto": the moving average
            if there is one.
        device: "auto": a GPU where there is one, else the CPU; or any device of torch.

    Returns:
        An `ImageClassifier` if the model was trained on images with normalization and returns one logit per class:
        it maps uint8 images to logits, and images of any size to probabilities. Otherwise the model itself.

    Raises:
        UserError: an argument is not one of these, the checkpoint is missing or damaged, or lacks what the model
            needs; the model cannot be built, or the weights do not fit it.
    """
    _require_one_of("which", which, "newest", "best")
    _require_one_of("weights", weights, "auto", "ema", "model")
    return build(Trained.read(path, which, weights), find_device(device))


def _require_one_of(name: str, value: str, *known: str) -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}: it must be one of {', '.join(known)}")


def find_device(device: str | torch.device) -> torch.device:
    """Returns a device of this process; "auto" is a GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    has_gpu = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_gpu else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device is {device!r}: it must be auto, cpu, cuda or another device of torch") from None
    if found.type == "cuda" and not has_gpu:
        raise UserError(f"device is {device}, but there is no GPU that PyTorch can use: use cpu")
    return found


def build(trained: Trained, device: torch.device) -> nn.Module:
    """Builds the model of a checkpoint; returns and raises as `load_model`."""
    shape, precision = trained.shape, trained.config["precision"]
    dtype = parameter_dtype(precision)
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and replaced
        model = zoo.of_config(trained.config, shape, len(trained.classes))
    model.to(dtype).eval()
    classifier = None
    if len(shape) == IMAGE_DIMENSIONS and trained.classes and trained.statistics is not None:
        mean, std = trained.statistics
        channels, height, width = shape
        classifier = ImageClassifier(
            model,
            classes=trained.classes,
            shape=(channels, height, width),
            mean=mean,
            std=std,
            resize=trained.resize,
            precision=precision,
            dtype=dtype,
            checkpoint=trained.path,
            parallel=trained.parallel,
        )
    if classifier is not None and any(map(is_lazy, model.parameters())):  # their shapes depend on the inputs
        _returns_logits(classifier)
    trained.load_into(model)
    if classifier is not None and _returns_logits(classifier):
        return classifier.to(device)
    return model.to(device)


def _returns_logits(classifier: ImageClassifier) -> bool:
    """Tries the model on a black image."""
    image = torch.zeros(1, *classifier.shape, dtype=torch.uint8)
    try:
        with torch.no_grad():
            outputs = classifier(image)
    except AttributeError:  # no tensor
        return False
    except Exception as error:
        name = f"the model of checkpoint {classifier.checkpoint}"
        raise UserError(f"{name} fails with an image of shape {classifier.shape}: {failure(error)}") from error
    return bool(outputs.shape == (1, len(classifier.classes)) and outputs.is_floating_point())
