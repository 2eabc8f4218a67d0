"""`Advice`: what is known of all settings, and what follows from it. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hvd_adam.advise.choice import (
    Row,
    Saturation,
    Setting,
    cheapest,
    relative_updates,
    rows_of,
    saturation,
    soonest,
)
from hvd_adam.advise.record import Record
from hvd_adam.advise.step_time import StepTime
from hvd_adam.errors import UserError
from hvd_adam.report.runs import CONFIG_FILE
from hvd_adam.schedule import Scaled, scale
from hvd_adam.text import shown

Basis = Literal["run", "measured", "calibration", "calibration and measured"]

MORE_RANKS = (2, 4, 8)  # times the run's, for what they bring at best


@dataclass(frozen=True)
class Advice:
    """The advice for a run.

    Attributes:
        record: the run.
        base: the setting that others are compared with: the run's own.
        basis: what the seconds of updates are from.
        rows: all settings.
        soonest, cheapest: of them.
        at_ends: global batch and ranks of the soonest one if the noise scale is the low end, and the high end, of
            its interval.
        saturation: from which number of ranks on more do not help; None with one number of ranks, or if the
            largest number helps.
    """

    record: Record
    base: Setting
    basis: Basis
    rows: Sequence[Row]
    soonest: Row
    cheapest: Row
    at_ends: tuple[tuple[int, int], tuple[int, int]]
    saturation: Saturation | None

    @classmethod
    def of(cls, record: Record, base: Setting, basis: Basis, found: Sequence[Setting], times: StepTime) -> Advice:
        """Returns the advice.

        Args:
            record: the run.
            base: its setting; its time is known.
            basis: what `times` is from.
            found: settings to choose from.
            times: seconds of updates.
        """
        noise = record.noise
        rows = rows_of(found, base, noise.value, times)
        ends = [soonest(rows_of(found, base, end, times)) for end in (noise.low, noise.high)]
        low, high = ((row.global_batch, row.ranks) for row in ends)
        first, least = soonest(rows), cheapest(rows)
        return cls(record, base, basis, rows, first, least, (low, high), saturation(rows))

    def is_base(self, row: Row) -> bool:
        """Returns whether a row is the run's own setting."""
        own = self.base
        return (row.ranks, row.micro_batch, row.accumulate) == (own.ranks, own.micro_batch, own.accumulate)

    def at_best(self) -> list[tuple[int, float, float]]:
        """Returns for more ranks, each with the run's own batch: their number, and bounds of time and rank-hours.

        No network makes them smaller: an update takes at least as long as on the run's ranks.
        """
        found = []
        for factor in MORE_RANKS:
            batch = factor * self.base.global_batch
            if self.record.train_samples is None or batch <= self.record.train_samples:
                time = relative_updates(batch, self.base.global_batch, self.record.noise.value)
                found.append((factor * self.base.ranks, time, factor * time))
        return found


def options_for(record: Record, setting: Setting | Row) -> Mapping[str, float | tuple[float, float]]:
    """Returns --lr, --betas and --eps of the training command with which its --lr-scaling fits a setting.

    --lr-scaling scales them by ranks × micro-batches, these options by the samples of a micro-batch. The rules are
    such that both together scale them by the global batch. Betas and ε are left out if they do not change.

    Raises:
        UserError: the rule cannot scale them by so much, or those of the run are not valid.
    """
    (lr,), (eps,) = _numbers(record, "lr", [1e-3]), _numbers(record, "eps", [1e-8])
    first, second = _numbers(record, "betas", [0.9, 0.999], below=1.0)
    plain = Scaled(lr, (first, second), eps)
    rule = str(record.config.get("lr_scaling", "none"))
    factor = setting.micro_batch / record.micro_batch
    scale(factor * setting.ranks * setting.accumulate, rule, **plain._asdict())  # what both make of them together
    base = scale(factor, rule, **plain._asdict())
    found: dict[str, float | tuple[float, float]] = {"lr": base.lr}
    if base.betas != plain.betas:
        found["betas"] = base.betas
    if base.eps != plain.eps:
        found["eps"] = base.eps
    return found


def _numbers(record: Record, name: str, default: list[float], below: float = math.inf) -> list[float]:
    """Returns the numbers of an option of the run, as many as it has by default."""
    value = record.config.get(name, default)
    try:
        found = [float(each) for each in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError):
        found = []
    if len(found) != len(default) or not all(0 <= number < below for number in found):
        wanted = f"{'a number' if len(default) == 1 else 'two numbers'} in [0, {below:g})"
        raise UserError(f"{record.folder / CONFIG_FILE}: {name} is {shown(str(value))}: it must be {wanted}")
    return found


def command_line(record: Record, row: Row) -> str:
    """Returns the options of the training command for a setting."""
    words = [f"--batch-size {row.micro_batch}"]
    if (row.accumulate, record.accumulate) != (1, 1):
        words.append(f"--accumulate {row.accumulate}")
    for name, value in options_for(record, row).items():
        shown = f"{value[0]:.6g},{value[1]:.6g}" if isinstance(value, tuple) else f"{value:.6g}"
        words.append(f"--{name} {shown}")
    return " ".join(words)
