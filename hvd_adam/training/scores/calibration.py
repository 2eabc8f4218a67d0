"""`Calibration`: whether a classifier is right as often as the probabilities of its predictions say.

Guo et al. 2017, "On calibration of modern neural networks", arXiv 1706.04599, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BINS = 15  # as in the paper's experiments


@dataclass(frozen=True)
class Bin:
    """The samples whose top probability is in ((m - 1) / BINS, m / BINS], m = 1 … BINS.

    Attributes:
        samples: how many.
        confidence: sum of their top probabilities.
        correct: how many of them were classified correctly.
    """

    samples: int
    confidence: float
    correct: int

    @property
    def mean_confidence(self) -> float | None:
        """Mean top probability, in [0, 1]; None without samples."""
        return self.confidence / self.samples if self.samples else None

    @property
    def accuracy(self) -> float | None:
        """Fraction of the samples that are correct, in [0, 1]; None without samples."""
        return self.correct / self.samples if self.samples else None

    @property
    def gap(self) -> float:
        """|accuracy - mean confidence|, in [0, 1]; 0 without samples."""
        return abs(self.correct - self.confidence) / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class Calibration:
    """A reliability diagram and its summaries. Samples whose outputs are not finite are left out.

    Attributes:
        bins: `BINS` bins of equal width of the top probability, ascending.
        nll: mean negative log-likelihood of the true class in nats; None if it is the loss itself, or not finite.
    """

    bins: tuple[Bin, ...]
    nll: float | None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(each.samples for each in self.bins)

    @property
    def expected_error(self) -> float | None:
        """Expected calibration error, equation 3 of the paper, in [0, 1]; None without samples."""
        return sum(each.samples * each.gap for each in self.bins) / self.samples if self.samples else None

    @property
    def maximum_error(self) -> float | None:
        """Maximum calibration error, equation 5 of the paper: the largest gap of a bin; None without samples."""
        return max(each.gap for each in self.bins) if self.samples else None

    @property
    def mean_confidence(self) -> float | None:
        """Mean top probability, in [0, 1]; None without samples."""
        return sum(each.confidence for each in self.bins) / self.samples if self.samples else None

    def rows(self) -> list[list[Any]]:
        """Returns for each bin its number of samples, mean confidence and accuracy (None without samples)."""
        return [[each.samples, each.mean_confidence, each.accuracy] for each in self.bins]


def edges(bin_number: int, bins: int = BINS) -> tuple[float, float]:
    """Returns the limits of a bin, from 0: probabilities above the first, up to the second."""
    return bin_number / bins, (bin_number + 1) / bins


def is_rows(value: Any) -> bool:
    """Returns whether a value that was read from a file is what `Calibration.rows` returns."""
    return isinstance(value, list) and bool(value) and all(map(_is_row, value))


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[0], int) or row[0] < 0:
        return False
    return all(value is None or _is_fraction(value) for value in row[1:]) and (None in row) == (row[0] == 0)


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1 + 1e-9
