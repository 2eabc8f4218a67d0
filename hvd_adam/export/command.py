"""`export`: from a checkpoint to a file whose outputs have been compared with the model's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.config import ExportConfig
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.errors import UserError
from hvd_adam.export import formats
from hvd_adam.inference.classifier import ImageClassifier
from hvd_adam.inference.load import build
from hvd_adam.inference.trained import Trained
from hvd_adam.log import logger, write_result
from hvd_adam.training.outputs import require_outputs


def export(config: ExportConfig) -> None:
    """Writes the file, and its path, size and largest difference to stdout.

    The model is exported in float32, on the CPU.

    Raises:
        UserError: a launcher started several ranks; the file exists or cannot be written; the model is not a
            classifier of images (torch and onnx), cannot be exported, or the file's outputs differ.
    """
    require_no_launcher()
    formats.require_release(config.format)
    path = Path(config.output)
    require_outputs({"--output": config.output}, replace=config.force)
    trained = Trained.of_options(config)
    model = build(trained, torch.device("cpu"))
    with whole_file("--output", path) as draft:
        difference = _write(model, trained, config.format, draft)
    compared = "weights identical" if difference is None else f"logits within {difference:.1e} of the model's"
    write_result(f"{path}: {config.format}, {path.stat().st_size / 1e6:.1f} MB, {compared}\n")


def _write(model: nn.Module, trained: Trained, form: str, draft: Path) -> float | None:
    """Writes and checks a file; returns the largest difference of a logit, relative to the largest logit."""
    metadata = _metadata(model, trained)
    if form == "safetensors":
        formats.write_safetensors(model.model if isinstance(model, ImageClassifier) else model, draft, metadata)
        return None
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"checkpoint {trained.path} is not of a classifier of images: use --format safetensors, or load it "
            "with hvd_adam.load_model and export it with examples of its inputs"
        )
    if model.precision != "fp32":
        logger.info(f"trained with --precision {model.precision}; exported in float32")
    model.precision = "fp32"
    return formats.write_program(model.float(), form, draft, metadata)


def _metadata(model: nn.Module, trained: Trained) -> dict[str, str]:
    """Returns what a user of the file needs, each as JSON."""
    values: dict[str, Any] = {"classes": list(trained.classes), "shape": list(trained.shape)}
    if isinstance(model, ImageClassifier):
        values |= {"mean": list(model.mean), "std": list(model.std)}
        values["resize"] = None if model.resize is None else list(model.resize)
    config: Mapping[str, Any] = trained.config
    values |= {"model": config["model"], "model_args": config.get("model_args"), "precision": config["precision"]}
    return {name: json.dumps(value) for name, value in values.items()}
