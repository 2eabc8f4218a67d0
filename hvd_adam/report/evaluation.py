"""What the page shows of the last evaluation of each run: recall of the classes, reliability, mistakes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from hvd_adam.report.runs import Run, number
from hvd_adam.training.scores.calibration import edges

MOST_CLASSES = 20  # of the table of recalls

# The plot of a reliability diagram in the coordinates of its SVG.
LEFT, TOP, SIDE = 40, 14, 240


def recalls(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns the table of recalls: the classes with the lowest recall in any of the runs that have recorded it.

    It has the "runs" with their place on the page, "rows" of a class's name and its recall by run as text, and how
    many classes are "left" out; the rows are empty if no run has recalls.
    """
    known = [(place, run) for place, run in enumerate(runs) if run.recall]
    numbers = range(len(known[0][1].classes)) if known else range(0)
    by_class = list(zip(*(run.recall for _, run in known), strict=True))
    lowest = [min((value for value in values if value is not None), default=math.inf) for values in by_class]
    chosen = list(numbers)
    if len(chosen) > MOST_CLASSES:
        chosen = sorted(numbers, key=lambda n: (lowest[n], n))[:MOST_CLASSES]
    rows = [(known[0][1].classes[n], list(map(_percent, by_class[n]))) for n in chosen]
    return {
        "runs": [(place, run.name) for place, run in known],
        "rows": rows,
        "left": len(numbers) - len(rows),
        "all": len(numbers),
    }


def reliability(run: Run, place: int) -> dict[str, Any]:
    """Returns a reliability diagram: its bars and the mean probabilities as coordinates, with texts.

    Args:
        run: which has a calibration.
        place: of the run on the page, which has a color for each.
    """
    bars = []
    rows = run.calibration
    for number_of_bin, (samples, confidence, accuracy) in enumerate(rows):
        if samples:
            low, high = edges(number_of_bin, len(rows))
            bars.append(
                {
                    "x": round(LEFT + SIDE * low, 2),
                    "width": round(SIDE / len(rows) - 1, 2),
                    "y": round(TOP + SIDE * (1 - accuracy), 2),
                    "height": round(SIDE * accuracy, 2),
                    "dot": round(LEFT + SIDE * confidence, 2),
                    "samples": f"{samples:,}",
                    "text": f"probability {low:.2f} to {high:.2f}: {samples:,} samples, mean probability "
                    f"{confidence:.3f}, accuracy {accuracy:.3f}",
                }
            )
    last = run.last("eval")
    error = number(last, "test_ece")
    return {
        "run": run.name,
        "place": place,
        "step": last["step"],
        "error": "" if error is None else f"{error:.4f}",
        "bars": bars,
        "left": LEFT,
        "top": TOP,
        "side": SIDE,
    }


def mistakes(run: Run) -> dict[str, Any]:
    """Returns the most confident mistakes of a run: each with its picture as a "data:" address, and texts."""
    shown = run.mistakes
    return {
        "run": run.name,
        "step": 0 if shown is None else shown.step,
        "mistakes": [
            {
                "index": mistake.index,
                "label": mistake.label,
                "predicted": mistake.predicted,
                "probability": f"{100 * mistake.probability:.1f} %",
                "picture": f"data:image/png;base64,{base64.b64encode(mistake.png).decode()}",
            }
            for mistake in ([] if shown is None else shown.mistakes)
        ],
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
