"""`compare.png`: curves, learning rates or gradients or batch sizes, and the final accuracies of a comparison."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from hvd_adam.compare.summary import Row


def png(study: str, rows: Sequence[Row]) -> bytes:
    """Returns a picture of a comparison.

    Args:
        study: --study.
        rows: of `summary.summarize`.
    """
    from matplotlib.figure import Figure  # without pyplot, which takes half a second more to import

    figure = Figure(figsize=(15, 4.5 + 0.1 * len(rows)), layout="constrained")
    curves, middle, final = figure.subplots(1, 3)
    colors, styles = _looks(rows)
    for row, color, style in zip(rows, colors, styles, strict=True):
        _draw_curve(curves, row, color, style)
        _MIDDLE[study](middle, row, color, style)
    if study == "batch-size":
        _draw_batch_sizes(middle, rows)
    curves.set(title="validation", xlabel="updates", ylabel="accuracy", ylim=(0, 1.02))
    curves.legend(fontsize=7)
    for axes in (curves, middle):
        axes.grid(alpha=0.3)
    _draw_final(final, rows, colors)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _looks(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Returns a color for each variant, and a style of line for each optimizer that has variants."""
    names = [row["name"].split(": ") for row in rows]
    variants, optimizers = (list(dict.fromkeys(name[end] for name in names)) for end in (-1, 0))
    colors = [f"C{variants.index(name[-1]) % 10}" for name in names]
    styles = [("-", "--", ":", "-.")[optimizers.index(name[0]) % 4 if len(name) > 1 else 0] for name in names]
    return colors, styles


def _draw_curve(axes: Any, row: Row, color: str, style: str) -> None:
    updates, means, errors = zip(*row["curve"], strict=True)
    axes.plot(updates, means, style, color=color, label=row["name"], linewidth=1.2)
    low, high = (
        [mean + sign * (error or 0) for mean, error in zip(means, errors, strict=True)] for sign in (-1, 1)
    )
    axes.fill_between(updates, low, high, color=color, alpha=0.15)


def _draw_grid(axes: Any, row: Row, color: str, style: str) -> None:
    lrs, values = zip(*((point["lr"], point["validation_accuracy"]) for point in row["grid"]), strict=True)
    axes.plot(lrs, values, f"o{style}", color=color, markersize=4)
    axes.set(xscale="log", title="sensitivity to the learning rate", xlabel="lr", ylabel="validation accuracy")


def _draw_norms(axes: Any, row: Row, color: str, style: str) -> None:
    # Zeros have no logarithm: they are left out.
    norms = [norm if norm else math.nan for norm in row["gradient_norms"][0]]
    axes.plot(range(1, len(norms) + 1), norms, f".{style}", color=color)
    axes.set(yscale="log", title="gradient at the first update", xlabel="layer", ylabel="norm")


def _draw_nothing(axes: Any, row: Row, color: str, style: str) -> None:
    """The batch sizes of all rows are drawn together."""


def _draw_batch_sizes(axes: Any, rows: Sequence[Row]) -> None:
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for optimizer in optimizers:
        for number, rule in enumerate(rules):
            mine = [row for row in rows if row["optimizer"] == optimizer]
            line = [row for row in mine if row["rule"] == rule or row["baseline"] is None]
            sizes, means = [row["batch_size"] for row in line], [row["test_accuracy"] for row in line]
            errors = [row["test_accuracy_error"] for row in line]
            style = "-" if optimizer == optimizers[0] else "--"
            axes.errorbar(sizes, means, errors, fmt=f"o{style}", color=f"C{number}", label=f"{optimizer}: {rule}")
    axes.set(title="scaling of the learning rate", xlabel="images per update", ylabel="test accuracy")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(fontsize=7)


_MIDDLE = {
    "optimizers": _draw_grid,
    "initialization": _draw_norms,
    "vanishing": _draw_norms,
    "batch-size": _draw_nothing,
}


def _draw_final(axes: Any, rows: Sequence[Row], colors: Sequence[str]) -> None:
    # Points, not bars: the axis need not begin at 0.
    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        axes.errorbar(
            row["test_accuracy"], place, xerr=row["test_accuracy_error"], fmt="o", color=color, capsize=4
        )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set(title="test", xlabel="accuracy ± standard error")
