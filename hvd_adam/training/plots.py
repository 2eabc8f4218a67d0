"""`curves.png`: loss, learning rate and test accuracy of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hvd_adam.training.run_log import METRICS_FILE, read_events

PLOT_FILE = "curves.png"


def plot(folder: Path) -> Path:
    """Plots loss, learning rate and test accuracy from `metrics.jsonl`; returns the path of `curves.png`.

    Args:
        folder: the run folder.

    Raises:
        OSError: the plot cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which takes half a second more to import

    events = list(read_events(folder / METRICS_FILE))
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "eval"]
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.92, bottom=0.12, wspace=0.35)
    left, right = figure.subplots(1, 2)
    left.plot(_column(steps, "step"), _column(steps, "loss"), label="train loss")
    test_loss = _column(evaluations, "test_loss")
    left.plot(_column(evaluations, "step"), test_loss, "o-", label="test loss", markersize=3)
    left.set(xlabel="step", title="cross-entropy, and learning rate (dashed)", yscale="log")
    left.legend()
    rate = left.twinx()
    rate.plot(_column(steps, "step"), _column(steps, "lr"), color="grey", linewidth=0.8, linestyle="--")
    right.plot(_column(evaluations, "step"), _column(evaluations, "test_accuracy"), "o-", markersize=3)
    right.set(xlabel="step", title="test accuracy")
    right.grid(alpha=0.3)
    figure.savefig(folder / PLOT_FILE, dpi=120)
    return folder / PLOT_FILE


def try_plot(folder: Path) -> Path | str:
    """Calls `plot`; returns the path, or why it failed, for example because the disk is full."""
    try:
        return plot(folder)
    except OSError as error:  # the metrics have all that the plot shows
        return f"not drawn: {error.strerror}"


def _column(events: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if event[name] is None else event[name] for event in events]
