"""The scores of an evaluation as lines of text, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from hvd_adam.data.protocols import Data
from hvd_adam.text import printable, shown
from hvd_adam.training.scores.calibration import Calibration, edges
from hvd_adam.training.scores.class_counts import ClassCounts
from hvd_adam.training.scores.scoring import Scores

MOST_COLUMNS = 20  # classes of a confusion matrix in text; with more, lines are wider than a terminal

_NONE = "–"
_NO_LOGITS = (
    "no table of classes, confusion and calibration: outputs are not logits of shape (samples, classes), or "
    "targets not labels"
)


def as_json(scores: Scores, data: Data, checkpoint: Path) -> str:
    """Returns all scores as one JSON object on one line.

    Args:
        scores: of the checkpoint.
        data: the data set.
        checkpoint: its folder.
    """
    counts, calibration = scores.counts, scores.calibration
    values = scores.as_dict() | {
        "classes": None if counts is None else _class_objects(counts, data.classes),
        "confusions": None if counts is None else _wrong_pairs(counts),
        "unpredicted": None if counts is None else counts.unpredicted,
        "test_mce": None if calibration is None else calibration.maximum_error,
        "mean_confidence": None if calibration is None else calibration.mean_confidence,
        "nll": None if calibration is None else calibration.nll,
    }
    finite = {
        name: None if isinstance(value, float) and not isfinite(value) else value for name, value in values.items()
    }
    return json.dumps({**finite, "checkpoint": str(checkpoint)}, allow_nan=False)


def _class_objects(counts: ClassCounts, names: Sequence[str]) -> list[dict[str, Any]]:
    whole = zip(counts.support.tolist(), counts.predictions.tolist(), counts.correct.tolist(), strict=True)
    ratios = zip(*map(_numbers, (counts.precision, counts.recall, counts.f1)), strict=True)
    rows = []
    for number, (name, (samples, predicted, correct), (precision, recall, f1)) in enumerate(
        zip(names, whole, ratios, strict=True)
    ):
        other, times = counts.most_confused.get(number, (None, 0))
        row = {"name": name, "samples": samples, "predicted": predicted, "correct": correct}
        row |= {"precision": precision, "recall": recall, "f1": f1}
        rows.append(row | {"confused_with": None if other is None else names[other], "confused": times})
    return rows


def _numbers(values: np.ndarray) -> list[float | None]:
    """Returns numbers as JSON has them: None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


def _wrong_pairs(counts: ClassCounts) -> list[list[int]]:
    """Returns true class, predicted class and number of samples of each kind of mistake."""
    wrong = (counts.true != counts.predicted) & (counts.predicted < counts.classes)
    pairs: list[list[int]] = np.stack([counts.true, counts.predicted, counts.samples], axis=1)[wrong].tolist()
    return pairs


def as_text(scores: Scores, data: Data, checkpoint: Path, per_class: int) -> str:
    """Returns the scores as lines of text.

    Args:
        scores: of the checkpoint.
        data: the data set.
        checkpoint: its folder.
        per_class: the most classes of the table of classes: those with the lowest recall; 0 for no table.
    """
    means = {"loss": scores.test_loss, "accuracy": scores.test_accuracy}
    means |= {"balanced accuracy": scores.test_balanced_accuracy}
    means |= {name.replace("_", " "): value for name, value in scores.metrics.items()}
    lines = [f"checkpoint {printable(str(checkpoint))}", f"test samples {scores.images} of {printable(data.name)}"]
    lines += [f"test {name} {value:.4f}" for name, value in means.items() if value is not None]
    if scores.counts is None or scores.calibration is None:
        return "\n".join([*lines, _NO_LOGITS])
    if scores.counts.unpredicted:
        lines.append(f"{scores.counts.unpredicted} samples have outputs that are not finite, and count as wrong")
    names = [shown(name) for name in data.classes]
    if per_class:
        lines += ["", *class_lines(scores.counts, names, per_class)]
    lines += ["", *_confusion_lines(scores.counts, names), "", *calibration_lines(scores.calibration)]
    return "\n".join(lines)


def class_lines(counts: ClassCounts, names: Sequence[str], most: int) -> list[str]:
    """Returns the table of classes: all in their order, or the `most` ones with the lowest recall.

    Args:
        counts: of the samples.
        names: of the classes.
        most: the most classes to list, at least 1.
    """
    numbers = list(range(len(names)))
    recall = counts.recall
    if len(numbers) > most:
        worst = sorted(numbers, key=lambda n: (np.isnan(recall[n]), recall[n], n))  # those without samples last
        numbers = worst[:most]
    head = ["class", "samples", "precision", "recall", "f1", "most often taken for"]
    rows = [head]
    for n in numbers:
        other, times = counts.most_confused.get(n, (None, 0))
        taken = _NONE if other is None else f"{names[other]} ({times})"
        ratios = [_ratio(float(values[n])) for values in (counts.precision, recall, counts.f1)]
        rows.append([names[n], str(counts.support[n]), *ratios, taken])
    lines = _aligned(rows, left={0, 5})
    if len(names) > most:
        left = len(names) - most
        lines.append(
            f"{left:,} of {len(names):,} classes, with higher recall or no samples, are left out: "
            f"--per-class {len(names)} lists all"
        )
    return lines


def _confusion_lines(counts: ClassCounts, names: Sequence[str]) -> list[str]:
    if len(names) > MOST_COLUMNS:
        return [f"confusion matrix left out: {len(names):,} classes are too many for text; --json has its counts"]
    numbers = [str(n) for n in range(len(names))]
    labels = [name if name == n else f"{name} [{n}]" for name, n in zip(names, numbers, strict=True)]
    rows = [["", *numbers]]
    rows += [[label, *map(str, row)] for label, row in zip(labels, counts.matrix().tolist(), strict=True)]
    return ["samples by true class (rows) and predicted class (columns)", *_aligned(rows, left={0})]


def calibration_lines(calibration: Calibration) -> list[str]:
    """Returns the summaries of a calibration and its bins that have samples."""
    if not calibration.samples:
        return ["no calibration: no output is finite"]
    summary = {
        "expected error": calibration.expected_error,
        "maximum error": calibration.maximum_error,
        "mean confidence": calibration.mean_confidence,
        "negative log-likelihood": calibration.nll,
    }
    text = ", ".join(f"{name} {value:.4f}" for name, value in summary.items() if value is not None)
    rows = [["probability", "samples", "mean confidence", "accuracy"]]
    for number, (samples, confidence, accuracy) in enumerate(calibration.rows()):
        if samples:
            low, high = edges(number)
            rows.append([f"{low:.3f} to {high:.3f}", str(samples), f"{confidence:.4f}", f"{accuracy:.4f}"])
    return [f"calibration: {text}", *_aligned(rows, left={0})]


def _aligned(rows: Sequence[Sequence[str]], left: set[int]) -> list[str]:
    """Returns rows in columns of fixed width, aligned on the right but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            f"{cell:<{width}}" if place in left else f"{cell:>{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _ratio(value: float) -> str:
    return _NONE if np.isnan(value) else f"{value:.4f}"
