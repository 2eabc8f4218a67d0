"""`predict`: from files to lines of classes and probabilities."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

from hvd_adam.config import PredictConfig
from hvd_adam.data.datasets import UnreadableSample
from hvd_adam.data.image_folder.files import decode
from hvd_adam.data.image_folder.scan import images_below
from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.errors import UserError
from hvd_adam.inference.classifier import ImageClassifier
from hvd_adam.inference.load import build, find_device
from hvd_adam.inference.predictions import shortest
from hvd_adam.inference.trained import Trained
from hvd_adam.log import write_result
from hvd_adam.text import printable

STDIN = "-"
BATCH = 64  # files that are in memory at a time

Item = TypeVar("Item")


def predict(config: PredictConfig) -> None:
    """Writes one line per file to stdout, in the order of the files, as soon as its batch is classified.

    Raises:
        UserError: a launcher started several ranks; the model is not a classifier of images; a file is missing,
            before anything is written; or a file is not an image, after the lines of the batches before it.
    """
    require_no_launcher()
    files = list(_files(config.files))
    trained = Trained.of_options(config)
    try:
        device = find_device(config.device)
    except UserError as error:  # "device is …"
        raise UserError(f"--{error}") from None
    model = build(trained, device)
    if not isinstance(model, ImageClassifier):
        raise UserError(f"checkpoint {trained.path} is not of a classifier of images: use hvd_adam.load_model")
    mode = model.require_files()

    def read(file: str) -> torch.Tensor:
        return model.preprocess(decode("/dev/stdin" if file == STDIN else file, mode))

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        for batch in _batched(files, BATCH):
            try:
                images = torch.stack(list(pool.map(read, batch)))
            except UnreadableSample as error:
                raise UserError(f"cannot read {error}: repair it, or leave it out") from None
            rows = model.predict(images).cpu()
            for file, row in zip(batch, rows, strict=True):
                if not row.isfinite().all():
                    raise UserError(
                        f"checkpoint {trained.path}: its outputs for {file} are not finite: use another checkpoint"
                    )
            lines = [_line(*one, model.classes, config) for one in zip(batch, rows, strict=True)]
            write_result("".join(lines))


def _files(given: Iterable[str]) -> Iterator[str]:
    """Yields the files, and those with the ending of an image in each folder and its subfolders, sorted."""
    for name in given:
        if name == STDIN:
            yield name
            continue
        try:
            if not os.path.isdir(name):
                os.stat(name)
            below = images_below(name) if os.path.isdir(name) else [name]
        except UserError:  # links that lead in a circle
            raise
        except (OSError, ValueError) as error:
            reason, place = (
                getattr(error, "strerror", None) or str(error),
                getattr(error, "filename", None) or name,
            )
            raise UserError(f"cannot read {place or repr(place)} ({reason}): check its name") from None
        if not below:
            raise UserError(f"folder {name} has no images: name the files, or another folder")
        yield from below


def _batched(items: list[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _line(file: str, probabilities: torch.Tensor, classes: tuple[str, ...], config: PredictConfig) -> str:
    """Returns the line of a file: its name and the most probable classes."""
    values, indices = probabilities.sort(descending=True, stable=True)
    best = indices[: config.top].tolist()
    top = [(classes[index], value) for index, value in zip(best, shortest(values[: config.top]), strict=True)]
    if config.json:
        predictions = [{"class": name, "probability": value} for name, value in top]
        return json.dumps({"file": file, "predictions": predictions}) + "\n"
    columns = [column for name, value in top for column in (name, f"{value:.4f}")]
    return "\t".join(map(printable, [file, *columns])) + "\n"
