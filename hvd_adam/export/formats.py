"""The file formats: how each is written, and read again to compare its outputs with the model's."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hvd_adam.checkpoint.files import errors_of_writes
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure
from hvd_adam.inference.classifier import ImageClassifier

INPUT, OUTPUT = "images", "logits"  # names in ONNX files
TOLERANCE = 1e-5  # of a logit, relative to the largest one
OLDEST_RELEASES = {"torch": (2, 2), "onnx": (2, 6)}  # of torch, for batches of any size
CHECKED_BATCHES = (1, 3)  # sizes; the example that is traced has another one

Run = Callable[[torch.Tensor], torch.Tensor]


def require_release(form: str) -> None:
    """Raises UserError if this release of torch cannot write a format."""
    release: Any = torch.__version__  # compares with tuples
    oldest = OLDEST_RELEASES.get(form, (0,))
    if release < oldest:
        needed = ".".join(map(str, oldest))
        raise UserError(f"--format {form} needs torch {needed} or newer, not {release}: use --format safetensors")


def write_program(model: ImageClassifier, form: str, path: Path, metadata: Mapping[str, str]) -> float:
    """Writes a model as a program: uint8 images of any number to logits, normalization included.

    Args:
        model: in float32, on the CPU.
        form: "torch" or "onnx".
        path: of the file.
        metadata: to store in it.

    Returns:
        The largest difference between a logit of the file and of the model, relative to the largest logit.

    Raises:
        UserError: the model cannot be exported, or the outputs differ.
    """
    write = {"torch": _write_torch, "onnx": _write_onnx}[form]
    try:
        with _quiet(), torch.no_grad(), errors_of_writes():
            run = write(model, path, metadata)
            difference = max(relative_difference(run, model, size) for size in CHECKED_BATCHES)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"--format {form}: the model cannot be exported: {_reason(error)}") from error
    if math.isnan(difference):
        raise UserError(f"--format {form}: logits are not finite; nothing is written. Export another checkpoint")
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format {form}: logits of the exported model differ by {difference:.1e} of the largest one, more "
            f"than {TOLERANCE:.0e}; nothing is written. Is its output random, or does its code depend on values?"
        )
    return difference


def _write_torch(model: ImageClassifier, path: Path, metadata: Mapping[str, str]) -> Run:
    program = _traced(model)
    with path.open("wb") as file:  # of a path, torch writes in C++, where a full disk is a RuntimeError
        torch.export.save(program, file, extra_files=dict(metadata))
    loaded: Run = torch.export.load(path).module()
    return loaded


def _write_onnx(model: ImageClassifier, path: Path, metadata: Mapping[str, str]) -> Run:
    import onnxruntime

    program: Any = torch.onnx.export(
        _traced(model), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _traced(model: ImageClassifier) -> torch.export.ExportedProgram:
    example = _images(model, max(CHECKED_BATCHES) + 1)
    return torch.export.export(model, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})


def _images(model: ImageClassifier, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, *model.shape), dtype=torch.uint8, generator=generator)


def relative_difference(run: Run, model: ImageClassifier, count: int) -> float:
    """Returns the largest difference between a logit of a program and of a model, relative to the largest logit.

    Args:
        run: the program.
        model: the model.
        count: number of random images to compare with.
    """
    images = _images(model, count)
    expected = model(images)
    return float((run(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _reason(error: Exception) -> str:
    """Returns the line of an error that says most; the exporters explain at length."""
    cause: BaseException = error
    while type(cause).__module__.startswith("torch.onnx") and cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, Exception)
    return failure(cause)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what the exporters print and log: an error has it in one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        discarded = io.StringIO()
        printed = contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded)
        with warnings.catch_warnings(), printed[0], printed[1]:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def write_safetensors(model: nn.Module, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the model's state dictionary, and reads it again.

    Args:
        model: the trained model itself, on the CPU.
        path: of the file.
        metadata: to store in its header.

    Raises:
        UserError: a tensor is another one in the file.
    """
    from safetensors.torch import load_file, save

    # Copies: the format refuses tensors that share memory, as tied weights do.
    weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    path.write_bytes(save(weights, dict(metadata)))  # save_file would make a file that only its owner can read
    saved = load_file(path)
    for name, value in weights.items():
        if not (saved[name].dtype == value.dtype and torch.equal(_bytes(saved[name]), _bytes(value))):
            raise UserError(f"--format safetensors: {name} is another tensor in the file; nothing is written")


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """Returns the memory of a tensor: NaN, which weights may have, is not equal to itself."""
    return values.flatten().view(torch.uint8)
