"""`Datasets`: PyTorch data sets for training and testing, with the facts that training needs of them.

Imports no torch, so that commands can answer before it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from hvd_adam.data.images import require_statistics
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure

KINDS = "map-style torch Dataset, or an IterableDataset with a length"
_MOST_TRIED = 32  # samples that are read for the shape: where a whole folder is missing, none can be


class UnreadableSample(Exception):
    """Raised by `__getitem__` for a sample whose file is damaged or cannot be read.

    `WorkerLoader` trains on the next sample instead and leaves the sample out of the evaluation, up to its limit.
    Any other exception of `__getitem__` ends the run.

    Args:
        path: the file.
        reason: why it cannot be read.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both: an exception is pickled by its arguments
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class MapDataset(Sized, Protocol):
    """A map-style data set, such as `torch.utils.data.Dataset`."""

    def __getitem__(self, index: int, /) -> Any:
        """Returns sample `index`, 0 ≤ index < len: a pair of an input and a target."""


class StreamDataset(Sized, Protocol):
    """A `torch.utils.data.IterableDataset` with a length.

    It yields the same samples, in the same order, on every rank: each rank reads all of them and keeps its share.
    If it has a method `set_epoch`, that is called with the epoch, from 0, before each pass.
    """

    def __iter__(self) -> Iterator[Any]:
        """Yields len samples, no more and no fewer: pairs of an input and a target."""


def is_stream(dataset: object) -> bool:
    """Returns whether a data set is iterable and not map-style."""
    from torch.utils.data import IterableDataset

    return isinstance(dataset, IterableDataset)


def first_sample(dataset: Any) -> Any:
    """Returns the first sample of a data set of either style."""
    return next(iter(dataset)) if is_stream(dataset) else dataset[0]


def _first_readable(dataset: Any) -> Any:
    """Returns the first sample that can be read, of the first few; a stream is read up to its first sample only.

    Raises:
        UnreadableSample: none can be read; that of the first one.
    """
    try:
        return first_sample(dataset)
    except UnreadableSample:
        if is_stream(dataset):
            raise
        for index in range(1, min(len(dataset), _MOST_TRIED)):
            with suppress(UnreadableSample):
                return dataset[index]
        raise


def number_of_samples(dataset: Any, what: str) -> int:
    """Returns the length of a data set of either style.

    Args:
        dataset: of any class.
        what: the data set and its part, for messages.

    Raises:
        UserError: it has no `__len__`, or that does not return a number of samples.
    """
    kind = type(dataset).__name__
    if not hasattr(type(dataset), "__len__"):
        raise UserError(f"{what} is a {kind} without __len__ (the number of samples): give a {KINDS}")
    try:
        return len(dataset)
    except Exception as error:
        raise UserError(
            f"{what} is a {kind} whose __len__ fails: {failure(error)}: let it return the number of samples"
        ) from error


@dataclass(frozen=True)
class Datasets:
    """Training and test samples as PyTorch data sets, each map-style or iterable.

    A sample is `(input, target)`. Inputs are tensors or numpy arrays, all of one shape; a target is a class as an
    integer, or anything that `torch.utils.data.default_collate` joins to a tensor. Random augmentation belongs in
    `__getitem__`, or `__iter__`, of the training set; it may draw from the global generators of torch, numpy and
    Python.

    Raises:
        UserError: a part has no length or no samples, `mean` and `std` do not fit each other, or `resize` is not
            a height and a width.
    """

    train: MapDataset | StreamDataset
    """Training samples."""
    test: MapDataset | StreamDataset
    """Test samples."""
    classes: tuple[str, ...]
    """Names of the classes; empty where targets are not classes."""
    name: str = "datasets"
    """Name in messages and run directories."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel of inputs of dtype uint8, in units where 255 is 1; None: they are not normalized."""
    std: tuple[float, ...] | None = None
    """As `mean`, the standard deviation, above 0. Both are given, or neither."""
    shape: tuple[int, ...] | None = None
    """Shape of an input; None: it is read from the first readable training sample when needed."""
    resize: tuple[int, int] | None = None
    """Height and width that a test image is resized to cover, before its center is cropped to them and then to
    `shape`, so that `hvd_adam.predict` can do the same with other files; None: not known."""
    preload: tuple[str, ...] = ()
    """Modules that worker processes need; they are imported once for all workers of a rank."""
    fingerprint: str = ""
    """Checksum of the samples, which ranks and resumed runs compare; empty: `hvd_adam.train` makes one of a few
    samples."""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            if not number_of_samples(getattr(self, part), f"data set {self.name}: {part}"):
                raise UserError(f"data set {self.name}: there are no {part} samples")
        require_statistics(self.mean, self.std, f"data set {self.name}")
        sides = self.resize if isinstance(self.resize, tuple | list) else ()
        if self.resize is not None and [isinstance(side, int) and side > 0 for side in sides] != [True, True]:
            raise UserError(f"data set {self.name}: resize is {self.resize!r}: it must be (height, width) or None")

    @cached_property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of an input.

        Raises:
            UserError: `shape` is None, and none of the first training samples can be read.
        """
        if self.shape is not None:
            return self.shape
        from hvd_adam.data.workers.random_state import preserved  # it imports torch

        with preserved():  # the sample may be augmented
            try:
                sample = _first_readable(self.train)
            except UnreadableSample as error:
                raise UserError(
                    f"data set {self.name}: none of the first training samples can be read, so the shape of an "
                    f"input is not known: the first is {error}: repair or remove them, or give shape"
                ) from None
        return tuple(sample[0].shape)

    def summary(self) -> str:
        """Returns shape, classes and numbers of samples, for the first line of a run."""
        shape, classes = "×".join(map(str, self.sample_shape)), f"{len(self.classes)} classes, "
        sizes = f"{len(self.train)} training and {len(self.test)} test samples"
        return f"{shape}, {classes if self.classes else ''}{sizes}"
