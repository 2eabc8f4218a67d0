"""Checks what a data-set function of the user's own returns, with one message for each part that is missing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hvd_adam.data.datasets import (
    KINDS,
    Datasets,
    UnreadableSample,
    first_sample,
    is_stream,
    number_of_samples,
)
from hvd_adam.data.images import ImageData, require_class_names
from hvd_adam.data.workers.random_state import preserved, seed_all
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure

_COMPARED = 3  # samples of a map-style part that a checksum has: each takes the time of two reads

_PARTS = {
    "train": "a torch Dataset of training samples",
    "test": "a torch Dataset of test samples",
    "classes": "the names of the classes, empty if there are none",
    "name": "its name in messages and run folders",
}


def checked(value: Any, what: str) -> ImageData | Datasets:
    """Returns the data set that a function has returned: an `ImageData`, or the parts of `Datasets`.

    Args:
        value: an `ImageData`, a `Datasets`, or another object with the attributes of `Datasets`.
        what: the function, for messages.

    Raises:
        UserError: a part is missing or of the wrong kind, or the first sample is not (input, target).
    """
    if isinstance(value, ImageData):
        return value
    return checked_datasets(value, what)


def checked_datasets(value: Any, what: str) -> Datasets:
    """As `checked`, for everything but an `ImageData`."""
    if not any(hasattr(value, part) for part in ("train", "test")):
        raise UserError(
            f"{what} returned a {type(value).__name__}: return hvd_adam.data.ImageData, or "
            "hvd_adam.data.Datasets(train, test, classes)"
        )
    for part, meaning in _PARTS.items():
        if not hasattr(value, part):
            raise UserError(f"{what} returned a {type(value).__name__} without {part}: {meaning}")
    classes, name = value.classes, value.name
    require_class_names(classes, what)
    if len(classes) == 1:
        raise UserError(
            f"{what}: classes is {classes!r:.60}: it must be {_PARTS['classes']}, or two names or more"
        )
    if not isinstance(name, str) or not name:
        raise UserError(f"{what}: name is {name!r:.60}: it must be a text, {_PARTS['name']}")
    shapes = {part: _check_samples(getattr(value, part), f"{what}: {part}") for part in ("train", "test")}
    if None not in shapes.values() and shapes["train"] != shapes["test"]:
        raise UserError(
            f"{what}: inputs of train have shape {shapes['train']} but those of test {shapes['test']}: they must "
            "be the same"
        )
    made = value if isinstance(value, Datasets) else Datasets(value.train, value.test, tuple(classes), name=name)
    if made.fingerprint:
        return made
    return replace(made, fingerprint=_fingerprint(made.train) if is_stream(made.train) else _spot_check(made))


def _fingerprint(stream: Any) -> str:
    """Returns a checksum of the first sample, which differs between ranks if each has a stream of its own."""
    with preserved():
        seed_all(0)
        content = b"".join(map(_bytes, first_sample(stream)))
    return hashlib.sha256(content).hexdigest()[:16]


def _spot_check(made: Datasets) -> str:
    """Returns a checksum of a few samples of both parts, which differs between ranks or jobs with other samples.

    It is left empty where no sample of the training part says anything.
    """
    found = [_summary(made.train, index) for index in _spots(len(made.train))]
    if not any(found):
        return ""
    if not is_stream(made.test):
        found += [_summary(made.test, index) for index in _spots(len(made.test))]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _spots(samples: int) -> list[int]:
    """Returns the indices of the first sample, of the last, and of some between them."""
    return sorted({(samples - 1) * part // (_COMPARED - 1) for part in range(_COMPARED)})


def _summary(dataset: Any, index: int) -> str:
    """Returns what identifies a sample; nothing if it cannot be read, or draws numbers that have no known seed."""
    reads = []
    for _ in range(2):
        with preserved():
            seed_all(0)
            try:
                reads.append(" ".join(map(_rounded, dataset[index])))
            except (Exception, SystemExit):  # which the run reports when it reads this sample, or tolerates
                return ""
    return reads[0] if reads[0] == reads[1] else ""


def _rounded(value: Any) -> str:
    """Returns shape, mean and deviation: the last bits of a sample may depend on the processor and its threads."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # NumPy has no bfloat16
    array = np.asarray(value)
    array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return f"{array.shape} {array.mean():.3g} {array.std():.3g}" if array.size else str(array.shape)


def _bytes(value: Any) -> bytes:
    """Returns the bytes of a tensor, an array or a number."""
    if isinstance(value, torch.Tensor):  # of any dtype: NumPy has no bfloat16
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.asarray(value).tobytes()


def _check_samples(dataset: Any, what: str) -> tuple[int, ...] | None:
    """Checks one part and its first sample; returns the shape of its input, or None if it cannot be read."""
    samples = number_of_samples(dataset, what)
    if not is_stream(dataset) and not hasattr(type(dataset), "__getitem__"):
        meaning = "a sample (input, target) by its index"
        raise UserError(f"{what} is a {type(dataset).__name__} without __getitem__ ({meaning}): give a {KINDS}")
    if not samples:
        raise UserError(f"{what} is empty: it has no samples")
    try:
        with preserved():  # it may be augmented
            sample = first_sample(dataset)
    except UnreadableSample:
        return None  # which is counted when it is read
    except Exception as error:
        raise UserError(f"{what}[0] fails: {failure(error)}") from error
    if not isinstance(sample, list | tuple) or len(sample) != 2:
        kind = f"{len(sample)} parts" if isinstance(sample, list | tuple) else f"a {type(sample).__name__}"
        raise UserError(f"{what}[0] is {kind}: a sample must be (input, target)")
    for part, value in zip(("input", "target"), sample, strict=True):
        numbers = (int, float, np.number) if part == "target" else ()
        if not isinstance(value, (torch.Tensor, np.ndarray, *numbers)):
            wanted = "a tensor, a numpy array or a number" if numbers else "a tensor or a numpy array"
            raise UserError(f"{what}[0] has a {type(value).__name__} as its {part}: it must be {wanted}")
    return tuple(sample[0].shape)
