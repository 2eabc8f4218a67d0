"""`RunningEstimate`: the noise scale, with an interval, from measurements that are forgotten slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

DECAY = 0.98  # of the weight of a measurement, per later one: about 100 of them count
LEAST = 5  # measurements before there is an estimate
STATE_LENGTH = 11  # numbers of `RunningEstimate.state`
SCALE_DECAY = 0.9  # of the mean of S by which measurements are divided: about 10 of them count
_NORMAL = 1.96  # the 97.5 % quantile of the normal distribution


class NoiseEstimate(NamedTuple):
    """The gradient noise scale in batches of one update: the noise scale in samples is `value` × the global batch.

    With a batch of B samples, progress to a given loss takes about 1 + `value` times the updates that it takes
    with an infinite batch (McCandlish et al. 2018, arXiv 1812.06162, equation 2.11).

    Attributes:
        value: tr Σ / (B·|G|²), ≥ 0; infinity if no signal is found in the noise.
        low, high: ends of a 95 % interval, 0 ≤ low ≤ high ≤ infinity.
    """

    value: float
    low: float
    high: float


class RunningEstimate:
    """Weighted means of |G|² and of tr Σ / B, and their ratio.

    G is the gradient of the expected loss, Σ the covariance of the gradient of one sample, and B = n·b the number
    of samples of an update. n shares of b samples have the gradients g_i, with the mean ḡ. With S the mean of
    ‖g_i‖² and L = ‖ḡ‖², E[S] = |G|² + tr Σ / b and E[L] = |G|² + tr Σ / B, so that

    - tr Σ / B is estimated by (S − L) / (n − 1), and
    - |G|² by (n·L − S) / (n − 1) = L − (S − L) / (n − 1)

    without bias (McCandlish et al. 2018, appendix A.1). A single |G|² may be negative, so each is averaged by
    itself, and the noise scale is the ratio of the averages.

    Norms change during a training, with Adam's √v̂ by orders of magnitude, and the largest would decide both
    averages. So both parts of a measurement are divided by a running mean of S of earlier measurements, which the
    noise of this one does not depend on: the averages remain without bias.

    The interval is Fieller's (1954), for the ratio R = x̄/ȳ of two means: all R for which x̄ − R·ȳ differs from 0 by
    at most t standard errors. With weights w that add up to 1, the covariance of two means is estimated by
    Σ w² (x − x̄)(y − ȳ) · m/(m − 1), m = 1/Σw². t is the quantile of Student's distribution with m − 1 degrees of
    freedom, to first order in their inverse. Measurements count as independent; a drift of the noise scale within
    the last hundred widens the interval.
    """

    def __init__(self) -> None:
        self._sums = [0.0] * 3  # of w·(1, x, y), where x is tr Σ / B, and y is |G|², both divided by a mean of S
        self._squares = [0.0] * 6  # of w²·(1, x, y, x², x·y, y²)
        self._count = 0
        self._scale = 0.0  # running mean of S; 0 before the first measurement, which is divided by its own

    def add(self, own: float, mean: float, shares: int) -> None:
        """Adds a measurement; one that is not finite does not count.

        Args:
            own: S.
            mean: L.
            shares: n, at least 2.
        """
        scale = self._scale or own or 1.0
        x = (own - mean) / (shares - 1) / scale
        y = mean / scale - x
        if not math.isfinite(x * x + y * y):
            return
        self._scale = SCALE_DECAY * scale + (1 - SCALE_DECAY) * own
        self._sums = [DECAY * old + new for old, new in zip(self._sums, (1.0, x, y), strict=True)]
        terms = (1.0, x, y, x * x, x * y, y * y)
        self._squares = [DECAY**2 * old + new for old, new in zip(self._squares, terms, strict=True)]
        self._count += 1

    def read(self) -> NoiseEstimate | None:
        """Returns the estimate; None with fewer than five measurements."""
        if self._count < LEAST:
            return None
        total, x, y = self._sums
        x, y = max(x / total, 0.0), y / total
        w2, x2, y2, xx, xy, yy = (value / total**2 for value in self._squares)
        effective = 1 / w2
        correction = effective / (effective - 1)
        var_x = correction * (xx - 2 * x * x2 + x * x * w2)
        cov = correction * (xy - x * y2 - y * x2 + x * y * w2)
        var_y = correction * (yy - 2 * y * y2 + y * y * w2)
        # The first terms of Student's quantile in 1/ν (Abramowitz & Stegun 26.7.5).
        t = _NORMAL + (_NORMAL**3 + _NORMAL) / (4 * (effective - 1))
        low, high = _fieller(x, y, t * t * var_x, t * t * cov, t * t * var_y)
        return NoiseEstimate(x / y if y > 0 else math.inf, low, high)

    def state(self) -> list[float]:
        """Returns numbers from which `load_state` continues exactly."""
        return [float(self._count), *self._sums, *self._squares, self._scale]

    def load_state(self, saved: Sequence[float]) -> None:
        """Continues from what `state` returned."""
        count, *sums, self._scale = saved
        self._count, self._sums, self._squares = int(count), sums[:3], sums[3:]


def _fieller(x: float, y: float, vxx: float, vxy: float, vyy: float) -> tuple[float, float]:
    """Returns the ends, ≥ 0, of the R for which (x − R·y)² ≤ vxx − 2·R·vxy + R²·vyy.

    That is a·R² − 2·p·R + c ≤ 0. If y differs significantly from 0, a > 0 and R lies between the roots. If not, R
    may be infinite, and is at least the larger root, if there are any and 0 is not one of the R.
    """
    a, p, c = y * y - vyy, x * y - vxy, x * x - vxx
    discriminant = p * p - a * c
    if a > 0 and y > 0:
        root = math.sqrt(max(discriminant, 0.0))
        return max(0.0, (p - root) / a), max(0.0, (p + root) / a)
    if a == 0 or discriminant <= 0 or y * y > vyy:
        return (0.0, math.inf) if y * y <= vyy else (math.inf, math.inf)
    if c <= 0:  # x does not differ significantly from 0, nor does R
        return 0.0, math.inf
    return max(0.0, (p - math.sqrt(discriminant)) / a), math.inf  # the larger root, as a < 0
