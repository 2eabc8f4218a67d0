"""`measure`: the seconds of updates with several batches on this host, in branches of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from hvd_adam.advise.branches import Branches, Point
from hvd_adam.advise.choice import Setting
from hvd_adam.advise.step_time import Measured, fitted

BATCHES = 4  # that are measured; the line between them is fitted
TURNS = 2  # of all batches; the faster one counts, since other programs only lengthen an update
SECONDS = 3.0  # that a branch should take, without its start
LEAST_UPDATES, MOST_UPDATES = 16, 300
EVENTS = 12


def spread(found: Sequence[Setting], number: int) -> list[Setting]:
    """Returns up to `number` settings, evenly spaced in their order, the first and the last included."""
    last = len(found) - 1
    places = sorted({round(i * last / max(1, number - 1)) for i in range(number)})
    return [found[place] for place in places]


def measure(branches: Branches, found: Sequence[Setting], own: Setting, log: Callable[[str], object]) -> Measured:
    """Measures updates, in turns.

    Args:
        branches: of the run.
        found: settings to choose batches from.
        own: the run's setting on the ranks of a branch.
        log: receives a line for each measurement.

    Raises:
        UserError: a branch fails.
    """
    whole = [each for each in found if each.ranks == own.ranks and each.accumulate == 1]
    chosen = spread(whole, BATCHES)
    if own not in chosen:
        chosen.append(own)
    times: dict[Setting, list[float]] = {each: [] for each in chosen}
    for _ in range(TURNS):
        for each in chosen:
            expected = branches.record.seconds * max(1.0, each.global_batch / own.global_batch)
            updates = round(min(MOST_UPDATES, max(LEAST_UPDATES, SECONDS / expected)))
            points = branches.run(each, updates, EVENTS, scaled=False).points
            times[each].append(each.global_batch / speed(points))
            log(f"measured {each.global_batch} samples on {each.ranks} rank(s): {times[each][-1] * 1e3:.3g} ms")
    points_of_line = [(each.micro_batch, min(times[each])) for each in chosen if each.accumulate == 1]
    line = fitted(points_of_line or [(own.micro_batch, min(times[own]) / own.accumulate)])
    return Measured(own.ranks, own.micro_batch, own.accumulate, min(times[own]), line)


def speed(points: Sequence[Point]) -> float:
    """Returns the median samples per second of a branch, without its first third, in which it starts."""
    return median(point.samples_per_second for point in points[len(points) // 3 :])
