"""The tables of the page: last scores, events, options and their differences, as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from hvd_adam.config import TrainConfig
from hvd_adam.report.runs import Run, number

NONE = "–"
MOST_LISTED = 20  # events of a run and a kind


def scores(run: Run) -> dict[str, str]:
    """Returns the state and the last scores of a run by the head of their column."""
    start, steps, test, end = run.start, run.of("step"), run.last("eval"), run.last("end")
    total, updates = number(start, "total_steps"), max(event["step"] for event in run.events)
    best = max(run.of("eval"), key=lambda event: number(event, "test_accuracy") or 0, default={})
    best_text = _percent(number(best, "test_accuracy"))
    rate = number(end or run.last("step"), "images_per_second")
    return {
        "state": "finished" if end else "not finished",
        "updates": f"{updates:,}" + (f" of {total:,.0f}" if total else ""),
        "training loss": _format(number(steps[-1] if steps else {}, "loss"), ".4f"),
        "test loss": _format(number(test, "test_loss"), ".4f"),
        "test accuracy": _percent(number(test, "test_accuracy")),
        "balanced accuracy": _percent(number(test, "test_balanced_accuracy")),
        "calibration error": _format(number(test, "test_ece"), ".4f"),
        "best accuracy": best_text + (f" (update {best['step']:,})" if best_text != NONE else ""),
        **{key.replace("_", " "): _format(number(test, key), ".5g") for key in run.metrics},
        "images/s": NONE if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.3g}",
        "skipped updates": _format(number(run.last("skip"), "skipped") or 0, ",.0f"),
        "ranks": _format(number(start, "world_size"), ".0f"),
        "images per update": _format(number(start, "global_batch_size"), ",.0f"),
        "training time": _duration(_seconds(run)),
    }


def happenings(run: Run) -> list[str]:
    """Returns lines in the order of the events: starts, resumes and failures; then the checkpoints together."""
    lines, seen = [], Counter[str]()
    total = Counter(event["event"] for event in run.events)
    for event in run.events:
        kind = event["event"]
        seen[kind] += 1
        if kind in _HAPPENINGS and seen[kind] <= MOST_LISTED:
            lines.append(_HAPPENINGS[kind](event))
        elif kind in _HAPPENINGS and seen[kind] == total[kind]:
            lines.append(f"… {seen[kind] - MOST_LISTED:,} more, the last: {_HAPPENINGS[kind](event)}")
    if written := run.of("checkpoint"):
        lines.append(f"{_count(len(written), 'checkpoint')} written, the last of update {written[-1]['step']:,}")
    return lines


def _facts(event: dict[str, Any]) -> str:
    versions = event.get("versions")
    parts = [] if event.get("world_size") is None else [_count(event["world_size"], "rank")]
    if event.get("launcher") not in (None, "none"):
        parts.append(str(event["launcher"]))
    parts += [f"{name} {text}" for name, text in (versions if isinstance(versions, dict) else {}).items()]
    return ", ".join(parts)


def _who(event: dict[str, Any]) -> str:
    if event.get("rank") is None:
        return f"the {event.get('cause')} is"
    return f"rank {event['rank']} on {event.get('host')} is"


def _slowdown(event: dict[str, Any]) -> str:
    slowdown = number(event, "slowdown")
    return f"{event.get('cause')}" + ("" if slowdown is None else f", training is {100 * slowdown:.0f} % slower")


_HAPPENINGS = {
    "start": lambda event: f"started: {_facts(event)}",
    "resume": lambda event: f"resumed after update {event['step']:,} from {event.get('path')}: {_facts(event)}",
    "skip": lambda event: f"update skipped after update {event['step']:,}: {event.get('reason')}",
    "checkpoint_failed": lambda event: f"no checkpoint of update {event['step']:,}: {event.get('reason')}",
    "slow_rank": lambda event: f"from about update {event['step']:,} {_who(event)} slow: {_slowdown(event)}",
    "slow_rank_end": lambda event: (
        f"from about update {event['step']:,} {_who(event)} no longer slow: {event.get('cause')}"
    ),
    "end": lambda event: f"finished after update {event['step']:,}",
}


def _count(number: Any, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}" if isinstance(number, int) else f"{number} {noun}s"


def options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the options of all runs in the order of their files.

    Each has its "name", its "values" as text by run, whether they are "different" (except for the run folder,
    which always is), and whether each is "changed" from the default.
    """
    names = dict.fromkeys(name for run in runs for name in run.config or {})
    defaults = {item.name: item.default for item in fields(TrainConfig)}
    configs = [run.config for run in runs if run.config is not None]
    rows = []
    for name in names:
        values = [_option_text(config, name) for config in configs]
        rows.append(
            {
                "name": name,
                "values": [NONE if run.config is None else _option_text(run.config, name) for run in runs],
                "different": name != "output_dir" and len(set(values)) > 1,
                "changed": [
                    run.config is not None
                    and name in run.config
                    and name in defaults
                    and _text(run.config[name]) != _text(defaults[name])
                    for run in runs
                ],
            }
        )
    return rows


def _option_text(config: dict[str, Any], name: str) -> str:
    return _text(config[name]) if name in config else NONE


def _text(value: Any) -> str:
    """Returns a value as `config.yaml` shows it, on one line."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)  # all digits, so that two values are two texts
    return str(value) or "''"


def _seconds(run: Run) -> float | None:
    """Returns the time between the events, without the time in which the run was stopped."""
    times = [(event["event"], number(event, "time")) for event in run.events]
    gaps = [
        later - earlier
        for (_, earlier), (kind, later) in pairwise(times)
        if kind != "resume" and earlier is not None and later is not None
    ]
    return sum(gap for gap in gaps if gap > 0) if gaps else None


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _format(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.2f} %"
