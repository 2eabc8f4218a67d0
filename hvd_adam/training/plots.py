"""`curves.png`: loss, learning rate and test accuracy of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hvd_adam.training.run_log import METRICS_FILE, read_events

PLOT_FILE = "curves.png"


def _column(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if line[name] is None else line[name] for line in lines]


def plot(folder: Path) -> Path:
    """Draws loss, learning rate and test accuracy of a run folder's `metrics.jsonl` into `curves.png`."""
    from matplotlib.figure import Figure  # without pyplot, which takes half a second more

    lines = list(read_events(folder / METRICS_FILE))
    steps = [line for line in lines if line["event"] == "step"]
    tests = [line for line in lines if line["event"] == "eval"]
    figure = Figure(figsize=(10, 4))
    figure.subplots_adjust(left=0.07, right=0.98, top=0.92, bottom=0.12, wspace=0.35)
    left, right = figure.subplots(1, 2)
    left.plot(_column(steps, "step"), _column(steps, "loss"), label="train loss")
    left.plot(_column(tests, "step"), _column(tests, "test_loss"), "o-", label="test loss", markersize=3)
    left.set(xlabel="step", title="cross-entropy, and learning rate (dashed)", yscale="log")
    left.legend()
    rate = left.twinx()
    rate.plot(_column(steps, "step"), _column(steps, "lr"), color="grey", linewidth=0.8, linestyle="--")
    right.plot(_column(tests, "step"), _column(tests, "test_accuracy"), "o-", markersize=3)
    right.set(xlabel="step", title="test accuracy")
    right.grid(alpha=0.3)
    figure.savefig(folder / PLOT_FILE, dpi=120)
    return folder / PLOT_FILE
