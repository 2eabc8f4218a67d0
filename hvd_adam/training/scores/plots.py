"""`plot`: the confusion matrix and the reliability diagram of an evaluation as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_adam.text import shown
from hvd_adam.training.scores.calibration import BINS, Calibration
from hvd_adam.training.scores.class_counts import ClassCounts

MOST_NAMES = 30  # classes whose names are readable at the axes
LONGEST_TITLE = 120  # characters
MOST_NUMBERS = 15  # classes whose counts are readable in the cells
MOST_CLASSES = 2000  # classes of a matrix that is drawn: it has as many cells as a picture has pixels


def plot(path: Path, counts: ClassCounts, calibration: Calibration, classes: Sequence[str], title: str) -> None:
    """Draws an evaluation.

    Args:
        path: of the PNG file.
        counts: of the samples.
        calibration: of the same samples.
        classes: names of the classes, of any length.
        title: of the picture.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot, which takes half a second more to import

    drawn = Figure(figsize=(13, 6), layout="constrained")
    drawn.suptitle(shown(title, LONGEST_TITLE), parse_math=False)
    confusion, reliability = drawn.subplots(1, 2)
    _draw_confusion(confusion, counts, classes)
    _draw_reliability(reliability, calibration)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class's name in letters that no font has
        drawn.savefig(path, dpi=120, format="png")


def _draw_confusion(axes: Any, counts: ClassCounts, classes: Sequence[str]) -> None:
    axes.set(title="confusion: fractions of the true class", xlabel="predicted class", ylabel="true class")
    if len(classes) > MOST_CLASSES:
        axes.text(0.5, 0.5, f"{len(classes):,} classes", ha="center", transform=axes.transAxes)
        return
    matrix = counts.matrix()
    axes.imshow(matrix / np.maximum(counts.support, 1)[:, None], cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= MOST_NAMES:
        names = list(map(shown, classes))
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(classes) <= MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                color = "white" if number > counts.support[row] / 2 else "black"
                axes.text(column, row, str(number), ha="center", va="center", color=color)


def _draw_reliability(axes: Any, calibration: Calibration) -> None:
    error = calibration.expected_error
    title = "reliability" if error is None else f"reliability: expected calibration error {error:.4f}"
    axes.set(
        title=title, xlabel="probability of the predicted class", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.06)
    )
    for number, (samples, confidence, accuracy) in enumerate(calibration.rows()):
        if samples:
            axes.bar(number / BINS, accuracy, 1 / BINS, align="edge", color="tab:blue", edgecolor="white")
            axes.plot([confidence], [accuracy], "o", color="tab:orange", markersize=4)
            axes.annotate(f"{samples:,}", (confidence, accuracy), (0, 5), textcoords="offset points", ha="center")
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
