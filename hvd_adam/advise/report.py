"""The advice as text, and as JSON. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hvd_adam.advise.advice import Advice, command_line
from hvd_adam.advise.choice import LEAST_GAIN, Row, soonest

if TYPE_CHECKING:
    from hvd_adam.advise.confirm import Verdict

BASES = {
    "run": "ms per update: from the run's log; those of several micro-batches are upper bounds. Of smaller "
    "micro-batches, and other numbers of ranks, nothing is known: use --measure, or --calibration",
    "measured": "ms per update: measured here with some of the batches, and fitted as fixed + samples × each",
    "calibration": "ms per update: the cost model, with computing proportional to the samples and as fast as in "
    "the run. Of smaller micro-batches than the run's nothing is known: use --measure",
    "calibration and measured": "ms per update: the cost model, with computing as measured here with some of the "
    "batches",
}


def text(advice: Advice, price: float | None, verdict: Verdict | None) -> str:
    """Returns the table, and what follows from it.

    Args:
        advice: the advice.
        price: of a rank and hour, or None.
        verdict: of --confirm, or None.
    """
    lines = [_head(advice), "", *_table(advice, price), ""]
    lines += [*_findings(advice), "", BASES[advice.basis]]
    if len(_shown(advice)) < len(advice.rows):
        lines.append("of each number of ranks the soonest batch is shown: --json has all")
    lines.append(
        f"the noise scale is that after {advice.record.noise.step} updates; it usually grows in training: ask "
        "again later. It is a proxy, which --confirm checks"
    )
    if verdict is not None:
        lines += ["", *_verdict(verdict)]
    return "\n".join(lines) + "\n"


def as_json(advice: Advice, price: float | None, verdict: Verdict | None) -> str:
    """Returns one JSON object; arguments as for `text`. Numbers that are infinite are null."""
    noise = asdict(advice.record.noise)
    low, high = ({"global_batch": batch, "ranks": ranks} for batch, ranks in advice.at_ends)
    content = {
        "run": str(advice.record.folder),
        "noise_scale": {key: value if math.isfinite(value) else None for key, value in noise.items()},
        "basis": advice.basis,
        "base": asdict(advice.base),
        "rows": [_row(advice, row, price) for row in advice.rows],
        "soonest": _row(advice, advice.soonest, price),
        "cheapest": _row(advice, advice.cheapest, price),
        "soonest_at_low": low,
        "soonest_at_high": high,
        "saturation": None if advice.saturation is None else asdict(advice.saturation),
        "confirmed": None if verdict is None else asdict(verdict),
    }
    return json.dumps(content, allow_nan=False) + "\n"


def _row(advice: Advice, row: Row, price: float | None) -> dict[str, Any]:
    values = {**asdict(row), "options": command_line(advice.record, row)}
    return values if price is None else {**values, "price": _price(advice, row, price)}


def _price(advice: Advice, row: Row, price: float) -> float:
    """Returns what reaching the run's present loss costs in a setting."""
    base = next(each for each in advice.rows if advice.is_base(each))
    return price * row.relative_cost * base.ranks * base.seconds * advice.record.updates / 3600


def _head(advice: Advice) -> str:
    record, noise = advice.record, advice.record.noise
    form = " of Adam's update" if record.config.get("noise_scale_form") == "adam" else ""
    return (
        f"{record.folder}: {record.ranks} rank(s), {record.global_batch} samples per update, "
        f"{record.seconds * 1e3:.3g} ms per update; noise scale{form} {_samples(noise.value)} samples (95 % "
        f"interval {_samples(noise.low)} to {_samples(noise.high)})"
    )


def _samples(number: float) -> str:
    return f"{number:.0f}" if math.isfinite(number) else "infinity"


def _shown(advice: Advice) -> list[Row]:
    """Returns all rows of one number of ranks; of several numbers the soonest of each, and those with a mark."""
    numbers = {row.ranks for row in advice.rows}
    if len(numbers) == 1:
        return [*advice.rows]
    best = [soonest(row for row in advice.rows if row.ranks == n) for n in numbers]
    return [
        row
        for row in advice.rows
        if row in best or row in (advice.soonest, advice.cheapest) or advice.is_base(row)
    ]


def _table(advice: Advice, price: float | None) -> list[str]:
    header = ["ranks", "batch of a rank", "global batch", "ms per update", "updates", "time", "rank-hours"]
    rows = [[*header, *(["price so far"] if price is not None else []), ""]]
    for row in _shown(advice):
        share = f"{row.accumulate} × {row.micro_batch}" if row.accumulate > 1 else str(row.micro_batch)
        relative = (row.relative_updates, row.relative_time, row.relative_cost)
        cells = [f"{row.ranks:,}", share, f"{row.global_batch:,}", f"{row.seconds * 1e3:,.3g}"]
        cells += [f"{value:.2f}" for value in relative]
        if price is not None:
            cells.append(f"{_price(advice, row, price):,.4g}")
        rows.append([*cells, ", ".join(_marks(advice, row))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]


def _marks(advice: Advice, row: Row) -> list[str]:
    marks = ["this run"] if advice.is_base(row) else []
    if advice.basis == "run":  # of settings that cannot be sooner by what is known
        return marks
    marks += ["soonest"] if row == advice.soonest else []
    return marks + (["cheapest"] if row == advice.cheapest else [])


def _findings(advice: Advice) -> list[str]:
    """Returns what to use, how sure that is, and when more ranks do not help."""
    row, record = advice.soonest, advice.record
    lines = [f"soonest: {row.ranks} rank(s) with {command_line(record, row)} (--lr-scaling {_rule(advice)})"]
    if advice.basis == "run":
        lines = ["no batch is known to be sooner than that of the run: accumulation adds what it saves, or more"]
    elif advice.cheapest != row:
        lines.append(f"cheapest: {advice.cheapest.ranks} rank(s) with {command_line(record, advice.cheapest)}")
    if math.isinf(record.noise.value):
        lines.append(
            "no recent measurement of the noise scale is finite, so it is taken to be infinite: updates are "
            "inversely proportional to the batch"
        )
    low, high = advice.at_ends
    if low != high:
        shown = (f"{batch} samples on {ranks} rank(s)" for batch, ranks in (low, high))
        lines.append(f"at the ends of the noise scale's interval the soonest is {' and '.join(shown)}")
    found = advice.saturation
    if found is not None:
        reason = {
            "batch": f"their batch is beyond the noise scale ({_samples(record.noise.value)} samples), or would "
            "be too small for each of them",
            "network": "the network and waiting for other ranks take what they save",
        }[found.reason]
        lines.append(
            f"more than {found.ranks} rank(s) save less than {LEAST_GAIN:.0%} of the time: with {found.more}, "
            f"{reason}"
        )
    elif len({each.ranks for each in advice.rows}) == 1 and (bounds := advice.at_best()):
        shown = (f"{ranks} ranks {time:.2f} and {cost:.2f}" for ranks, time, cost in bounds)
        lines.append(f"time and rank-hours with more ranks and an infinitely fast network: {', '.join(shown)}")
    return lines


def _rule(advice: Advice) -> str:
    return str(advice.record.config.get("lr_scaling", "none"))


def _verdict(verdict: Verdict) -> list[str]:
    rows: list[Sequence[str]] = [
        ("global batch", "ms per update", f"s to loss {verdict.loss:.4g}", "lowest loss", "test loss")
    ]
    for each in verdict.branches:
        numbers = (each.to_loss, each.loss, each.test_loss)
        cells = ["-" if value is None else f"{value:.4g}" for value in numbers]
        rows.append((f"{each.global_batch:,}", f"{each.seconds * 1e3:,.3g}", *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    how = "which agrees with" if verdict.agrees else "which contradicts"
    within = f", within {LEAST_GAIN:.0%}" if verdict.agrees and verdict.soonest != verdict.advised else ""
    said = f"{verdict.soonest} samples reached the loss first, {how} the advice ({verdict.advised}{within})"
    if verdict.is_early:
        said = (
            f"{verdict.soonest} samples reached the loss before it was measured once: too short to compare; use "
            f"--samples with more than {verdict.samples}"
        )
    return [f"branches of {verdict.samples} samples from the newest checkpoint:", *lines, said]
