"""Which batch and number of ranks reach a loss soonest, and cheapest: pure functions. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hvd_adam.advise.step_time import StepTime

LEAST_GAIN = 0.05  # of the time, for which more ranks are worth mentioning
STEPS = (-3, -2, -1, 0, 1, 2, 3, 4, 5, 6)  # powers of 2 by which defaults differ from the run's own


def relative_updates(batch: float, own: float, noise_scale: float) -> float:
    """Returns the updates to a loss with a batch, relative to those with the run's own.

    S(B) = S_min · (1 + B_noise / B) (McCandlish et al. 2018, arXiv 1812.06162, equation 2.11).

    Args:
        batch: B, samples of an update.
        own: of the run.
        noise_scale: B_noise in samples; infinite: updates are inversely proportional to the batch.
    """
    if math.isinf(noise_scale):
        return own / batch
    return (1 + noise_scale / batch) / (1 + noise_scale / own)


@dataclass(frozen=True)
class Setting:
    """Ranks and batch of a run, or of what it is compared with.

    Attributes:
        ranks: number of ranks.
        micro_batch: samples of a micro-batch.
        accumulate: micro-batches of an update and rank.
        global_batch: samples of an update.
    """

    ranks: int
    micro_batch: int
    accumulate: int
    global_batch: int


@dataclass(frozen=True)
class Row(Setting):
    """A setting with its times.

    Attributes:
        seconds: of an update.
        alone: seconds of an update if network and waiting cost nothing.
        relative_updates: to a loss, relative to the run's own setting.
        relative_time: to a loss.
        relative_cost: rank-hours to a loss.
    """

    seconds: float
    alone: float
    relative_updates: float
    relative_time: float
    relative_cost: float


def by_factors_of_2(own: int) -> tuple[int, ...]:
    """Returns 1/8 to 64 times a number, as far as these are whole numbers."""
    return tuple(int(own * 2.0**power) for power in STEPS if own * 2.0**power % 1 == 0)


def settings(
    batches: Iterable[int], ranks: Iterable[int], own: Setting, most_samples: int | None, *, keep_micro_batch: bool
) -> list[Setting]:
    """Returns all settings whose batch divides by the number of ranks and micro-batches.

    Args:
        batches: global batches.
        ranks: numbers of ranks.
        own: the run's; always included.
        most_samples: of a micro-batch, if that is limited. Larger shares of a rank are accumulated.
        keep_micro_batch: accumulate micro-batches of the run's own size.
    """
    found = [own]
    for n in ranks:
        for batch in batches:
            share, rest = divmod(batch, n)
            limit = own.micro_batch if keep_micro_batch else most_samples or share
            if rest or share == 0:
                continue
            accumulate = -(-share // limit)
            setting = Setting(n, share // accumulate, accumulate, batch)
            if share % accumulate == 0 and setting not in found:
                found.append(setting)
    return sorted(found, key=lambda each: (each.ranks, each.global_batch))


def rows_of(found: Sequence[Setting], own: Setting, noise_scale: float, times: StepTime) -> list[Row]:
    """Returns a row for each setting of which a time is known.

    Args:
        found: settings.
        own: the run's; its time is known.
        noise_scale: in samples.
        times: seconds of updates.
    """
    base = times.update(own.ranks, own.micro_batch, own.accumulate)
    assert base is not None
    rows = []
    for each in found:
        time = times.update(each.ranks, each.micro_batch, each.accumulate)
        if time is not None:
            updates = relative_updates(each.global_batch, own.global_batch, noise_scale)
            relative = updates * time.seconds / base.seconds
            place = (each.ranks, each.micro_batch, each.accumulate, each.global_batch)
            rows.append(Row(*place, *time, updates, relative, relative * each.ranks / own.ranks))
    return rows


def soonest(rows: Iterable[Row]) -> Row:
    """Returns the row with the least time; of equal ones the cheapest."""
    return min(rows, key=lambda row: (row.relative_time, row.relative_cost))


def cheapest(rows: Iterable[Row]) -> Row:
    """Returns the row with the fewest rank-hours; of equal ones the soonest."""
    return min(rows, key=lambda row: (row.relative_cost, row.relative_time))


@dataclass(frozen=True)
class Saturation:
    """From which number of ranks on more of them do not help.

    Attributes:
        ranks: none of the larger numbers reaches the loss `LEAST_GAIN` sooner.
        more: the next larger number.
        reason: "batch": not even with a network that costs nothing. "network": with such a network they would.
    """

    ranks: int
    more: int
    reason: str


def saturation(rows: Sequence[Row]) -> Saturation | None:
    """Returns where more ranks stop to help; None if the largest number of ranks still does."""
    numbers = sorted({row.ranks for row in rows})
    best = {n: soonest(row for row in rows if row.ranks == n) for n in numbers}
    for n, more in pairwise(numbers):
        wanted = (1 - LEAST_GAIN) * best[n].relative_time
        if all(best[other].relative_time > wanted for other in numbers if other > n):
            free = min(row.relative_time * row.alone / row.seconds for row in rows if row.ranks == more)
            return Saturation(n, more, "network" if free <= wanted else "batch")
    return None
