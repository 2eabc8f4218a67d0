"""The curves of the page: panels as in `curves.png`, and the norm of the gradient; long curves are thinned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hvd_adam.report.runs import Run, number
from hvd_adam.training.plots import CROSS_ENTROPY

MOST_POINTS = 4000  # of a curve; the runs of a page share five times as many
MOST_MARKS = 500  # of a run and a kind


@dataclass(frozen=True)
class Curve:
    """A value of `metrics.jsonl`: of which event, its key, and what the legend calls it."""

    event: str
    key: str
    label: str


@dataclass(frozen=True)
class Panel:
    """A chart.

    Attributes:
        title: its title.
        unit: the label of its y axis.
        curves: what it shows of each run.
        scale: "percent", "zero" (the axis begins at 0), "log" (if the reader asks for it) or "linear".
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: str


MARKS = ("checkpoint", "resume", "skip")


def chart_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what the page's script draws, as JSON has it: names of the runs, panels and marks."""
    most = min(MOST_POINTS, 5 * MOST_POINTS // len(runs))
    return {
        "runs": [run.name for run in runs],
        "panels": [panel for panel in (_panel(panel, runs, most) for panel in panels(runs)) if panel["series"]],
        "marks": [
            {"run": place, "kind": kind, "steps": marks}
            for place, run in enumerate(runs)
            for kind in MARKS
            if (marks := _spread(sorted(event["step"] for event in run.of(kind))))
        ],
        "thinned": any(len(run.of("step")) > most for run in runs),
    }


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Returns the charts: those of `curves.png`, the norm of the gradient, and one for each of `--metrics`."""
    losses = {run.loss_function for run in runs}
    unit = f"{CROSS_ENTROPY} (nats)" if losses == {CROSS_ENTROPY} else ", ".join(sorted(losses))
    loss = Curve("step", "loss", "training"), Curve("eval", "test_loss", "test")
    accuracy = (
        Curve("eval", "test_accuracy", "accuracy"),
        Curve("eval", "test_balanced_accuracy", "balanced accuracy"),
    )
    throughput = Curve("step", "images_per_second", "")
    metrics = dict.fromkeys(key for run in runs for key in run.metrics)
    return [
        Panel("loss", unit, loss, "log"),
        Panel("test accuracy", "correct (%)", accuracy, "percent"),
        *(Panel(key.replace("_", " "), "", (Curve("eval", key, "test"),), "linear") for key in metrics),
        Panel("learning rate", "", (Curve("step", "lr", ""),), "zero"),
        Panel("throughput of all ranks", "images/s", (throughput,), "zero"),
        Panel("gradient norm", "2-norm, before clipping", (Curve("step", "grad_norm", ""),), "log"),
    ]


def _panel(panel: Panel, runs: Sequence[Run], most: int) -> dict[str, Any]:
    series: list[dict[str, Any]] = []
    for place, run in enumerate(runs):
        for which, curve in enumerate(panel.curves):
            points = _points(run, curve)
            if any(value is not None for value in points.values()):
                steps, values = thin(list(points.items()), most)
                series.append({"run": place, "curve": which, "label": curve.label, "x": steps, "y": values})
    positive = [value for each in series for value in each["y"] if value is not None and value > 0]
    spread = bool(positive) and max(positive) >= 3 * min(positive)
    return {
        "title": panel.title,
        "unit": panel.unit,
        "scale": panel.scale,
        "log": panel.title == "loss" and spread,  # as in curves.png
        "series": series,
    }


def _points(run: Run, curve: Curve) -> dict[int, float | None]:
    """Returns a value by its update, ascending; the last one, if an update has several."""
    values = {event["step"]: number(event, curve.key) for event in run.of(curve.event) if curve.key in event}
    return dict(sorted(values.items()))


def thin(points: list[tuple[int, float | None]], most: int) -> tuple[list[int], list[float | None]]:
    """Returns steps and values of a curve, at most `most` of them.

    Of each interval of a longer curve the first point, the lowest, the highest and one that is missing stay, so
    that no spike and no gap disappears. Values have six significant digits.
    """
    if len(points) > most:
        intervals = max(1, most // 4)
        bounds = [len(points) * n // intervals for n in range(intervals + 1)]
        kept: set[int] = set()
        for first, end in pairwise(bounds):
            finite = [n for n in range(first, end) if points[n][1] is not None]
            missing = [n for n in range(first, end) if points[n][1] is None]
            kept |= {first, *missing[:1]}
            if finite:
                kept |= {
                    min(finite, key=lambda n: points[n][1] or 0),
                    max(finite, key=lambda n: points[n][1] or 0),
                }
        points = [points[n] for n in sorted(kept)]
    return [step for step, _ in points], [None if value is None else float(f"{value:.6g}") for _, value in points]


def _spread(steps: list[int]) -> list[int]:
    """Returns at most `MOST_MARKS` of the steps, evenly spaced."""
    every = -(-len(steps) // MOST_MARKS) or 1
    return steps[::every]
