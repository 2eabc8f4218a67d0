"""Means, standard errors and tests of significance over seeds. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-12  # of a difference of accuracies: those of different numbers of images differ by far more


class Estimate(NamedTuple):
    """The mean of a value over seeds, and its standard error; None where a value is missing."""

    mean: float | None
    error: float | None


def estimate(values: Sequence[float | None]) -> Estimate:
    """Returns the mean and the standard error: the sample standard deviation over √n.

    Args:
        values: one for each seed, at least two for an error. None is not finite, and so is the mean then.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return Estimate(None, None)
    mean = float(np.mean(known))
    if len(known) < 2:
        return Estimate(mean, None)
    return Estimate(mean, float(np.std(known, ddof=1) / math.sqrt(len(known))))


def paired_p_value(values: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the two-sided p-value of the paired t-test that two means over the same seeds are equal.

    It is 0 if all differences are equal, and not 0: the test then has no variation to compare them with.

    Args:
        values: one for each seed, at least two.
        baseline: the other values, in the same order of the seeds.
    """
    differences = np.subtract(values, baseline)
    if np.ptp(differences) <= ROUNDING:  # the test divides by their standard deviation
        return 1.0 if abs(differences[0]) <= ROUNDING else 0.0
    from scipy import stats  # takes a second

    return float(stats.ttest_rel(values, baseline).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are adjusted for the number of tests (Holm 1979), in the order given.

    If no difference is real, the probability that any of them is below α is at most α.
    """
    count = len(p_values)
    adjusted = [0.0] * count
    largest = 0.0
    for place, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (count - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
