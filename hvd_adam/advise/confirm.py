"""`confirm`: branches with some batches, and which of them reaches a common loss first.

The noise scale is only a proxy of how many updates a batch saves (Merrill et al. 2025, arXiv 2505.23971, which
therefore branches short trainings); a measured loss over time is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hvd_adam.advise.branches import Branch, Branches
from hvd_adam.advise.choice import LEAST_GAIN, Row, Setting, soonest
from hvd_adam.advise.measure import speed
from hvd_adam.errors import UserError

UPDATES = 200  # of the run, by default, whose samples each batch is trained for
EVENTS = 16  # of the curve of a branch

Curve = list[tuple[float, float]]  # seconds of training, and the lowest loss so far


@dataclass(frozen=True)
class Confirmed:
    """What a branch has shown.

    Attributes:
        global_batch: samples of an update.
        seconds: of an update.
        to_loss: seconds of training to the common loss; None if it was not reached.
        loss: the lowest mean training loss between two events.
        test_loss: on the test set at the end; None if not finite.
    """

    global_batch: int
    seconds: float
    to_loss: float | None
    loss: float | None
    test_loss: float | None


@dataclass(frozen=True)
class Verdict:
    """The comparison of the branches.

    Attributes:
        samples: that each branch was trained for.
        loss: the lowest one that all branches reach.
        branches: in the order of their batches.
        soonest: the global batch that reached it first.
        advised: the one that was advised on so many ranks.
        agrees: whether they are the same, or differ by less than `LEAST_GAIN` of the time.
        is_early: whether the first one reached it before its first event, so that the branches are too short.
    """

    samples: int
    loss: float
    branches: list[Confirmed]
    soonest: int
    advised: int
    agrees: bool
    is_early: bool


def settings_by_batch(rows: Sequence[Row], own: Setting) -> dict[int, Setting]:
    """Returns the soonest setting of each batch on the run's number of ranks, its own batch included.

    The run may have divided its batch only to measure its noise scale: with fewer micro-batches it is faster.
    """
    found: dict[int, Setting] = {}
    for row in sorted(rows, key=lambda row: row.relative_time):
        if row.ranks == own.ranks:
            setting = Setting(row.ranks, row.micro_batch, row.accumulate, row.global_batch)
            found.setdefault(row.global_batch, setting)
    found.setdefault(own.global_batch, own)
    return dict(sorted(found.items()))


def next_batch(batches: Sequence[int], trained: Sequence[int], best: int) -> int | None:
    """Returns the next larger batch than the best one, or the next smaller; None if both are trained."""
    place = batches.index(best)
    near = [*batches[place + 1 : place + 2], *batches[max(0, place - 1) : place]]
    return next((batch for batch in near if batch not in trained), None)


def confirm(
    branches: Branches,
    rows: Sequence[Row],
    own: Setting,
    number: int,
    samples: int | None,
    log: Callable[[str], object],
) -> Verdict:
    """Trains the run's own and the advised batch for as many samples, and then neighbours of the better one.

    The neighbours of the best one so far follow until both are worse, since the noise scale may be wrong by a
    factor of several.

    Args:
        branches: of the run.
        rows: the advice.
        own: the run's setting on the ranks of a branch.
        number: of batches at most.
        samples: of each; None: those of 200 updates of the run.
        log: receives a line for each branch.

    Raises:
        UserError: a branch fails, or none has a finite loss.
    """
    branches.require_learning_rate()
    settings, wanted = settings_by_batch(rows, own), samples or UPDATES * own.global_batch
    advised = soonest(row for row in rows if row.ranks == own.ranks).global_batch
    trained: dict[int, Branch] = {}

    def train(batch: int) -> None:
        updates = max(2, -(-wanted // batch))
        log(f"training {updates} updates of {batch} samples on {own.ranks} rank(s)")
        trained[batch] = branches.run(settings[batch], updates, EVENTS)

    for batch in dict.fromkeys((own.global_batch, advised)):
        train(batch)
    while len(trained) < number:
        best = verdict(trained, wanted, advised).soonest
        following = next_batch([*settings], [*trained], best)
        if following is None:
            break
        train(following)
    return verdict(dict(sorted(trained.items())), wanted, advised)


def verdict(branches: Mapping[int, Branch], samples: int, advised: int) -> Verdict:
    """Compares the branches at the lowest loss that all of them reach.

    Args:
        branches: by global batch.
        samples: of each.
        advised: the global batch that the advice has soonest.

    Raises:
        UserError: no branch has a finite loss.
    """
    curves = {batch: curve(branch) for batch, branch in branches.items()}
    lowest = [points[-1][1] for points in curves.values() if points]
    if not lowest:
        raise UserError("no branch of --confirm has a finite loss: the run diverges from its newest checkpoint")
    common = max(lowest)
    times = {batch: time_to(points, common) for batch, points in curves.items()}
    rows = [
        Confirmed(
            batch,
            batch / speed(branch.points),
            times[batch] if math.isfinite(times[batch]) else None,
            curves[batch][-1][1] if curves[batch] else None,
            branch.test_loss,
        )
        for batch, branch in branches.items()
    ]
    first = min(times, key=times.__getitem__)
    agrees = times[advised] * (1 - LEAST_GAIN) <= times[first]
    is_early = times[first] == curves[first][0][0]
    return Verdict(samples, common, rows, first, advised, agrees, is_early)


def curve(branch: Branch) -> Curve:
    """Returns the lowest loss so far over the seconds of training at the branch's median speed.

    The first events are slow, since ranks and kernels start, and so are those that other programs disturb.
    """
    rate = speed(branch.points)
    found: Curve = []
    for point in branch.points:
        if point.loss is not None:
            found.append((point.samples / rate, min([point.loss, *(loss for _, loss in found[-1:])])))
    return found


def time_to(points: Curve, loss: float) -> float:
    """Returns the seconds at which a curve reaches a loss, interpolated; infinite if it does not."""
    if points and points[0][1] <= loss:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return math.inf
