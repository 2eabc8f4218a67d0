"""`score`: evaluates a model on the whole test set, exactly, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvd_adam.data.protocols import Loader
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.context import Cluster
from hvd_adam.errors import CollectiveError
from hvd_adam.training.objective import Objective
from hvd_adam.training.scores.calibration import BINS, Bin, Calibration
from hvd_adam.training.scores.class_counts import ClassCounts, distinct
from hvd_adam.training.scores.mistakes import Candidates, Mistake

Forward = Callable[[torch.Tensor], Any]

# The largest number of classes with a confusion matrix: more are neither readable nor small in `metrics.jsonl`.
CONFUSION_CLASSES = 50
RECALL_CLASSES = 2000  # as many numbers as of that matrix

_COMPACT_AFTER = 2**20  # samples whose classes are kept one by one


@dataclass(frozen=True)
class Scores:
    """What an evaluation finds on the whole test set.

    Attributes:
        test_loss: mean loss; cross-entropy in nats without a loss of the user's own.
        images: number of samples evaluated.
        metrics: means of the user's own metrics by name.
        counts: samples by true and predicted class; None unless all outputs are floating-point of shape
            (samples, classes), and targets int64 labels of shape (samples,).
        calibration: of the softmax of the outputs; None where `counts` is.
        mistakes: the most confident ones, descending; None if none were asked for, or inputs are no images.
    """

    test_loss: float
    images: int
    metrics: dict[str, float] = field(default_factory=dict)
    counts: ClassCounts | None = None
    calibration: Calibration | None = None
    mistakes: list[Mistake] | None = None

    @property
    def test_accuracy(self) -> float | None:
        """Fraction of samples classified correctly, in [0, 1]; None where `counts` is."""
        return None if self.counts is None else self.counts.accuracy

    @property
    def test_balanced_accuracy(self) -> float | None:
        """Mean over the classes of their accuracy, in [0, 1]; None where `counts` is."""
        return None if self.counts is None else self.counts.balanced_accuracy

    @property
    def confusion(self) -> list[list[int]] | None:
        """Samples by true (rows) and predicted class; None with more than `CONFUSION_CLASSES` classes."""
        if self.counts is None or self.counts.classes > CONFUSION_CLASSES:
            return None
        matrix: list[list[int]] = self.counts.matrix().tolist()
        return matrix

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values by name, as the event "eval" has them; a metric's name is preceded by "test_"."""
        counts, calibration = self.counts, self.calibration
        has_recall = counts is not None and counts.classes <= RECALL_CLASSES
        return {
            "test_loss": self.test_loss,
            "test_accuracy": self.test_accuracy,
            "test_balanced_accuracy": self.test_balanced_accuracy,
            "test_ece": None if calibration is None else calibration.expected_error,
            "images": self.images,
            "confusion": self.confusion,
            "recall": _rounded(counts.recall) if counts is not None and has_recall else None,
            "calibration": None if calibration is None else calibration.rows(),
            **{f"test_{name}": value for name, value in self.metrics.items()},
        }


def score(
    forward: Forward,
    loader: Loader,
    cluster: Cluster,
    objective: Objective,
    batch_size: int = 256,
    *,
    mistakes: int = 0,
    record: Callable[[Any, torch.Tensor], None] | None = None,
) -> Scores:
    """Evaluates every test sample exactly once over all ranks; every rank must call it.

    Args:
        forward: maps inputs to outputs. The caller sets the model to evaluation mode.
        loader: this rank's batches.
        cluster: this process.
        objective: loss and metrics.
        batch_size: samples per rank and batch.
        mistakes: how many of the most confident mistakes to return, if inputs are images.
        record: called with outputs and targets of each batch.

    Returns:
        The scores, identical on all ranks.

    Raises:
        UserError: a metric fails; raised on every rank.
    """
    tally = _Tally(loader, objective, mistakes)
    with raise_on_all_ranks(cluster), torch.inference_mode():
        for inputs, targets in loader.test_batches(batch_size, rank=cluster.rank, size=cluster.size):
            outputs = forward(inputs)
            if record is not None:
                record(outputs, targets)
            tally.add(inputs, targets, outputs)
    return tally.scores(cluster)


def _rounded(values: np.ndarray) -> list[float | None]:
    """Returns numbers to four decimals, None for NaN."""
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


class _Tally:
    """Sums over this rank's samples; they stay on the device until the end."""

    def __init__(self, loader: Loader, objective: Objective, mistakes: int) -> None:
        self._objective, self._classes = objective, len(loader.data.classes)
        self._has_nll = objective.own_loss is not None  # otherwise the loss is the same
        self._parts = [1, 1, len(objective.metrics), 1, 3 * BINS]
        self._sums = torch.zeros(sum(self._parts), dtype=torch.float64, device=loader.device)
        self._keys: list[torch.Tensor] = []
        self._samples: list[torch.Tensor] = []
        self._kept = 0
        self._candidates = Candidates.of(loader, mistakes) if mistakes and self._classes else None

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, outputs: Any) -> None:
        """Adds a batch."""
        loss, samples, metrics, nll, bins = torch.split(self._sums, self._parts)
        loss += self._objective.test_loss(outputs, targets)
        samples += len(inputs)
        metrics += self._objective.metric_sums(outputs, targets)
        if not _are_logits(outputs, targets, self._classes):
            return
        logits = outputs.double()  # of bfloat16, for example
        if self._has_nll:
            nll += F.cross_entropy(logits, targets, reduction="sum")
        top = logits.softmax(dim=1).amax(dim=1)
        predicted = torch.where(top.isnan(), self._classes, outputs.argmax(dim=1))
        bins += _binned(top, predicted == targets)
        self._add_keys((self._classes + 1) * targets + predicted)
        if self._candidates is not None:
            self._candidates.add(inputs, targets, predicted, top)

    def _add_keys(self, keys: torch.Tensor) -> None:
        self._keys.append(keys)
        self._samples.append(torch.ones_like(keys))
        self._kept += len(keys)
        if self._kept > _COMPACT_AFTER:
            self._keys, self._samples = ([part] for part in self._pairs())
            self._kept = 0

    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys of `ClassCounts.of_keys` that occur, and how often each does."""
        if not self._keys:
            return 2 * (torch.empty(0, dtype=torch.int64, device=self._sums.device),)
        pairs = (torch.cat(parts).cpu().numpy() for parts in (self._keys, self._samples))
        keys, samples = distinct(*pairs)
        return torch.from_numpy(keys).to(self._sums.device), torch.from_numpy(samples).to(self._sums.device)

    def scores(self, cluster: Cluster) -> Scores:
        """Returns the scores over all ranks; every rank calls it."""
        values = cluster.sum(self._sums).cpu()
        loss, samples, metrics, nll, bins = torch.split(values, self._parts)
        count = int(samples)
        if not count:
            raise CollectiveError("no test sample can be read: the warnings above name them")
        pairs = [torch.cat(parts).cpu().numpy() for parts in zip(*cluster.gather(self._pairs()), strict=True)]
        means = dict(zip(self._objective.metrics, (metrics / count).tolist(), strict=True))
        if int(pairs[1].sum()) < count:  # not all outputs were logits
            return Scores(loss.item() / count, count, means)
        rows = bins.view(BINS, 3).tolist()
        calibration = Calibration(
            tuple(Bin(int(samples), confidence, int(correct)) for samples, confidence, correct in rows),
            nll.item() / count if self._has_nll and bool(nll.isfinite()) else None,
        )
        counts = ClassCounts.of_keys(self._classes, *pairs)
        mistakes = None if self._candidates is None else self._candidates.most_confident(cluster)
        return Scores(loss.item() / count, count, means, counts, calibration, mistakes)


def _are_logits(outputs: Any, targets: torch.Tensor, classes: int) -> bool:
    return (
        classes > 0
        and isinstance(outputs, torch.Tensor)
        and outputs.is_floating_point()
        and outputs.shape == (len(targets), classes)
        and targets.ndim == 1
        and targets.dtype == torch.int64
    )


def _binned(top: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Returns for each bin the sums of 1, of the top probability and of the correct samples: (3 · BINS,).

    Args:
        top: top probabilities, float64 of shape (n,); NaN belongs to no bin.
        correct: bool of shape (n,).
    """
    place = (top * BINS).ceil().sub(1).clamp(0, BINS - 1)
    inside = place[:, None] == torch.arange(BINS, device=top.device)
    columns = torch.stack([torch.ones_like(top), top, correct.double()], dim=1)
    # Neither bincount nor index_add: on a GPU their order of additions is not fixed.
    return torch.where(inside[:, :, None], columns[:, None, :], 0.0).sum(dim=0).flatten()
