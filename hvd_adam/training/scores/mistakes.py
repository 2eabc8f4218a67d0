"""The test images that were classified wrongly with the highest probability, found during an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from hvd_adam.data.protocols import Loader
from hvd_adam.distributed.context import Cluster

MOST_MISTAKES = 24
LARGEST_SIDE = 64  # pixels of a kept picture; larger images are scaled down
SMALLEST_SIDE = 4  # of an image; less is a row of numbers

# Probabilities are compared to this many decimals: their last bits depend on the size of the batch, and with it on
# the number of ranks.
_DECIMALS = 6


@dataclass(frozen=True)
class Mistake:
    """A test image that was classified wrongly.

    Attributes:
        index: of the sample among the test samples that were read, from 0.
        label: its class.
        predicted: the class that it was taken for.
        probability: that the model gave this class, in (0, 1].
        picture: uint8, shape (channels, height, width), at most `LARGEST_SIDE` high and wide.
    """

    index: int
    label: int
    predicted: int
    probability: float
    picture: np.ndarray


class Candidates:
    """This rank's most confident mistakes so far, on the device; adding a batch does not wait for it.

    Args:
        loader: of the batches.
        most: how many to keep, at least 1.
    """

    def __init__(self, loader: Loader, most: int) -> None:
        channels, height, width = loader.data.sample_shape
        scale = min(1.0, LARGEST_SIDE / max(height, width))
        self._size = max(1, round(scale * height)), max(1, round(scale * width))
        self._channels, self._most, self._seen = channels, most, 0
        self._statistics = None
        if loader.statistics is not None:
            parts = (torch.tensor(part, dtype=torch.float64, device="cpu") for part in loader.statistics)
            self._statistics = [part.to(loader.device).view(-1, 1, 1) for part in parts]
        # Of each: probability, place among this rank's samples, label and predicted class.
        self._rows = torch.empty(0, 4, dtype=torch.float64, device=loader.device)
        self._pictures = torch.empty(0, channels, *self._size, dtype=torch.uint8, device=loader.device)

    @classmethod
    def of(cls, loader: Loader, most: int) -> Candidates | None:
        """Returns candidates for a data set of images with 1 or 3 channels; None for another one."""
        shape = loader.data.sample_shape
        is_image = len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= SMALLEST_SIDE
        return cls(loader, most) if is_image else None

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, predicted: torch.Tensor, top: torch.Tensor) -> None:
        """Takes the mistakes of a batch.

        Args:
            inputs: shape (n, channels, height, width).
            targets: labels, int64 of shape (n,).
            predicted: predicted classes, as `targets`.
            top: their probabilities, float64 of shape (n,); a sample with NaN has no prediction.
        """
        places = torch.arange(self._seen, self._seen + len(inputs), device=top.device)
        self._seen += len(inputs)
        if not inputs.is_floating_point() or inputs.ndim != 4 or inputs.shape[1] != self._channels:
            return  # other inputs than the data set declares, such as numbers of words
        wrong = (predicted != targets) & ~top.isnan()
        probability = torch.where(wrong, top.round(decimals=_DECIMALS), 0.0)
        rows = torch.stack([probability, *(part.double() for part in (places, targets, predicted))], dim=1)
        order = _highest(probability, self._most)
        rows = torch.cat([self._rows, rows[order]])
        pictures = torch.cat([self._pictures, self._as_pictures(inputs[order])])
        order = _highest(rows[:, 0], self._most)
        self._rows, self._pictures = rows[order], pictures[order]

    def _as_pictures(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns inputs as uint8 images.

        The normalization of the data set is undone. If it has none, the range of values is unknown: each image is
        then stretched from its lowest value to its highest one.
        """
        values = inputs.double()
        if self._statistics is not None:
            mean, std = self._statistics
            values = (values * std + mean) * 255
        if tuple(values.shape[2:]) != self._size:
            values = F.interpolate(values, self._size, mode="bilinear", antialias=True)
        if self._statistics is None:
            low, high = values.amin(dim=(1, 2, 3), keepdim=True), values.amax(dim=(1, 2, 3), keepdim=True)
            values = (values - low) / (high - low).clamp(min=1e-12) * 255
        return values.nan_to_num().round().clamp(0, 255).to(torch.uint8)

    def most_confident(self, cluster: Cluster) -> list[Mistake]:
        """Returns the most confident mistakes of all ranks, of equal probabilities those with the lowest index.

        Every rank must call it. Only the pictures that are returned are sent.
        """
        own = self._rows[self._rows[:, 0] > 0].cpu()
        found, first = [], 0
        for rank, (rows, seen) in enumerate(cluster.gather((own, self._seen))):
            for place, (probability, index, *classes) in enumerate(rows.tolist()):
                found.append((-probability, first + int(index), [int(each) for each in classes], rank, place))
            first += seen
        chosen = sorted(found)[: self._most]
        mine = [place for *_, rank, place in chosen if rank == cluster.rank]
        pictures = [iter(of_rank.cpu().numpy()) for of_rank in cluster.gather(self._pictures[mine])]
        return [
            Mistake(index, label, predicted, -negative, next(pictures[rank]))
            for negative, index, (label, predicted), rank, _ in chosen
        ]


def _highest(probabilities: torch.Tensor, most: int) -> torch.Tensor:
    """Returns the places of the highest probabilities, the first ones of equal ones (`topk` promises no order)."""
    return probabilities.sort(descending=True, stable=True).indices[:most]
