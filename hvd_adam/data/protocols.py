"""What training and evaluation need of a data set and of a loader, whatever its samples and wherever they lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs, and as many targets: int64 labels of shape `(samples,)` where there are classes."""


class Data(Protocol):
    """A data set, split into training and test samples."""

    @property
    def name(self) -> str:
        """Name in messages and run directories."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; a label is an index into them."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one input, as the model gets it without the dimension of the batch."""

    def summary(self) -> str:
        """Returns shape, classes and numbers of samples, for the first line of a run."""


class Loader(Protocol):
    """Batches of a data set on one rank's device.

    Attributes:
        data: the data set.
        device: of the batches.
        dtype: floating-point dtype of the inputs.
    """

    @property
    def data(self) -> Data:
        """The data set."""

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and standard deviation of each channel by which inputs are normalized; None if they are not."""

    device: torch.device
    dtype: torch.dtype

    def description(self) -> dict[str, Any]:
        """Returns what a checkpoint records of the data: see `checkpoint.state.TrainingState`."""

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """Returns the number of updates in an epoch.

        Args:
            global_batch_size: samples per update over all ranks.

        Raises:
            UserError: the batch is larger than the data.
        """

    def train_batches(
        self,
        seed: int,
        epoch: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> Iterator[Batch]:
        """Yields a rank's micro-batches of an epoch, `accumulate` for each update.

        The micro-batches of all ranks for an update form one global batch, which with its augmentation is the same
        at any `size` and `accumulate`.

        Args:
            seed: of order and augmentation.
            epoch: ≥ 0.
            global_batch_size: samples per update over all ranks.
            rank: 0 ≤ rank < size.
            size: number of ranks.
            accumulate: micro-batches per update and rank.
            first_step: update of the epoch to start from; skipped updates cost nothing.

        Raises:
            UserError: the global batch is larger than the data, or smaller than `size * accumulate`.
        """

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """Yields a rank's share of the test set. All ranks together yield every sample exactly once.

        Args:
            batch_size: the most samples of a batch.
            rank: 0 ≤ rank < size.
            size: number of ranks; some have no samples if there are fewer samples than ranks.
        """
