"""`ClassCounts`: how many samples of each class were predicted as which, and what follows from it by class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class ClassCounts:
    """Numbers of samples by true and predicted class: a sparse confusion matrix, small for any number of classes.

    A sample whose outputs are not finite has no prediction. It is not correct, and counts as predicted as
    class number `classes`, which does not exist.

    Attributes:
        classes: number of classes C.
        true: true class of each pair that occurs, int64 of shape (pairs,), in [0, C).
        predicted: its predicted class, in [0, C]; C for samples without a prediction.
        samples: its number of samples, at least 1.
    """

    classes: int
    true: np.ndarray
    predicted: np.ndarray
    samples: np.ndarray

    @classmethod
    def of_keys(cls, classes: int, keys: np.ndarray, samples: np.ndarray) -> ClassCounts:
        """Returns the counts of pairs, of which some may be the same.

        Args:
            classes: C.
            keys: true · (C + 1) + predicted, int64 of shape (n,).
            samples: the number of samples of each, int64 of shape (n,).
        """
        keys, samples = distinct(keys, samples)
        return cls(classes, keys // (classes + 1), keys % (classes + 1), samples)

    @cached_property
    def support(self) -> np.ndarray:
        """Samples of each true class, int64 of shape (C,)."""
        return self._sums(self.true, np.ones(len(self.true), dtype=bool))

    @cached_property
    def predictions(self) -> np.ndarray:
        """Samples predicted as each class, int64 of shape (C,)."""
        return self._sums(self.predicted, self.predicted < self.classes)

    @cached_property
    def correct(self) -> np.ndarray:
        """Samples of each class that were predicted as it, int64 of shape (C,)."""
        return self._sums(self.true, self.true == self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """Fraction of each class's samples that were predicted as it, in [0, 1]; NaN without samples."""
        return _ratio(self.correct, self.support)

    @property
    def precision(self) -> np.ndarray:
        """Fraction of the predictions of each class that were correct, in [0, 1]; NaN without predictions."""
        return _ratio(self.correct, self.predictions)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, in [0, 1]; NaN with neither samples nor predictions."""
        return _ratio(2 * self.correct, self.support + self.predictions)

    @property
    def accuracy(self) -> float:
        """Fraction of all samples that are correct, in [0, 1]."""
        return int(self.correct.sum()) / int(self.support.sum())

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have samples, in [0, 1]."""
        recalls: list[float] = self.recall[self.support > 0].tolist()
        return sum(recalls) / len(recalls)

    @property
    def unpredicted(self) -> int:
        """Number of samples without a prediction."""
        return int(self.samples[self.predicted == self.classes].sum())

    @cached_property
    def most_confused(self) -> dict[int, tuple[int, int]]:
        """For each class with mistakes, the other class it is most often predicted as, and how often.

        Of several the one with the lowest number.
        """
        found: dict[int, tuple[int, int]] = {}
        wrong = (self.true != self.predicted) & (self.predicted < self.classes)
        parts = (part[wrong].tolist() for part in (self.true, self.predicted, self.samples))
        for true, predicted, samples in zip(*parts, strict=True):  # ascending by true, then predicted
            if true not in found or samples > found[true][1]:
                found[true] = predicted, samples
        return found

    def matrix(self) -> np.ndarray:
        """Returns the confusion matrix, int64 of shape (C, C): rows are true classes, columns predicted ones."""
        full = np.zeros((self.classes, self.classes + 1), dtype=np.int64)
        full[self.true, self.predicted] = self.samples
        return full[:, : self.classes]

    def _sums(self, classes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        sums = np.zeros(self.classes, dtype=np.int64)
        np.add.at(sums, classes[chosen], self.samples[chosen])
        return sums


def distinct(keys: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the keys that occur, ascending, and the sum of the samples of each, both int64."""
    unique, place = np.unique(keys, return_inverse=True)
    added = np.zeros(len(unique), dtype=np.int64)
    np.add.at(added, place.reshape(-1), samples)
    return unique, added


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratios: np.ndarray = np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
    return ratios
