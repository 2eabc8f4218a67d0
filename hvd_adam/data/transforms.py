"""Transforms of the user's own (`--transforms`), with random numbers that depend on the sample's place only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import IterableDataset

from hvd_adam.data.datasets import Datasets, MapDataset, StreamDataset, is_stream
from hvd_adam.data.workers.random_state import preserved, seed_all
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure

Transform = Callable[[Any], Any]


def transform_batch(transform: Transform, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Transforms each image of a batch with random numbers of its own.

    Args:
        transform: the user's function, of one image.
        images: uint8, shape `(samples, channels, height, width)`.
        seeds: of each image, in [0, 2⁶⁴).

    Raises:
        UserError: the function fails, or returns something else than a uint8 image of the same shape.
    """
    made = []
    on_gpu = torch.random.fork_rng(devices=[images.device]) if images.is_cuda else nullcontext()
    with preserved(), on_gpu:
        for image, seed in zip(images, seeds, strict=True):
            seed_all(seed)
            if images.is_cuda:
                torch.cuda.manual_seed(seed % 2**63)
            made.append(_transformed(transform, image))
    return torch.stack(made)


def _transformed(transform: Transform, image: torch.Tensor) -> torch.Tensor:
    what = f"--transforms of a uint8 image of shape {tuple(image.shape)}"
    try:
        found = transform(image)
    except Exception as error:
        raise UserError(f"{what} fails: {failure(error)}") from error
    if isinstance(found, torch.Tensor) and (found.shape, found.dtype) == (image.shape, image.dtype):
        return found
    is_tensor = isinstance(found, torch.Tensor)
    kind = f"{found.dtype} of shape {tuple(found.shape)}" if is_tensor else f"a {type(found).__name__}"
    raise UserError(
        f"{what} returns {kind}: return a uint8 tensor of the same shape; normalization comes afterwards"
    )


@dataclass(frozen=True)
class TransformedDataset:
    """A map-style data set whose inputs are transformed, in the process that loads them.

    Attributes:
        dataset: its samples are (input, target).
        transform: called with the input, after the data set's own.
    """

    dataset: MapDataset
    transform: Transform

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Returns a sample with its input transformed."""
        value, target = self.dataset[index]
        return self.transform(value), target


@dataclass(frozen=True)
class TransformedStream(IterableDataset[tuple[Any, Any]]):
    """As `TransformedDataset`, of an iterable data set."""

    dataset: StreamDataset
    transform: Transform

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Yields the samples with their inputs transformed."""
        for value, target in self.dataset:
            yield self.transform(value), target


def transformed(data: Datasets, transform: Transform) -> Datasets:
    """Returns the data with its training inputs transformed."""
    kind: Any = TransformedStream if is_stream(data.train) else TransformedDataset
    return replace(data, train=kind(data.train, transform))
