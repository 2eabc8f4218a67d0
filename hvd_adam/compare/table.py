"""The table of a comparison, as text that is also Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hvd_adam.compare.summary import Row

SIGNIFICANT = 0.05

Column = tuple[str, Callable[[Row], str]]


def table(rows: Sequence[Row], target: float, *, norms: bool) -> str:
    """Returns the rows as a table, and notes on what its marks mean.

    Args:
        rows: of `summary.summarize`.
        target: the validation accuracy of the columns "to target".
        norms: whether to show the gradient norms of the first and the last layer.
    """
    columns: list[Column] = [
        ("", lambda row: row["name"]),
        ("lr", lambda row: f"{row['lr']:.4g}{'*' * row['at_end_of_grid']}"),
        ("test accuracy", lambda row: _with_error(row, "test_accuracy", ".4f")),
        ("test loss", lambda row: _with_error(row, "test_loss", ".3f")),
        (f"updates to {target:g}", lambda row: _to_target(row, "updates_to_target", ".0f")),
        (f"seconds to {target:g}", lambda row: _to_target(row, "seconds_to_target", ".2f")),
        ("p", _significance),
    ]
    if norms:
        columns.append(("gradient norm, first / last layer", _first_and_last))
    if any(row["diverged"] for row in rows):
        columns.append(("diverged", lambda row: f"{row['diverged']} of {row['seeds']}" if row["diverged"] else ""))
    return _format([[title for title, _ in columns], *([show(row) for _, show in columns] for row in rows)])


def notes(rows: Sequence[Row]) -> list[str]:
    """Returns what the columns and marks of the table mean."""
    lines = [f"± standard error over {rows[0]['seeds']} seeds."]
    if any(len(row["grid"]) > 1 for row in rows):
        lines[0] += " Learning rates were chosen on validation images."
    if any(row["p_value_holm"] is not None for row in rows):
        baselines = " or ".join(dict.fromkeys(f"'{row['baseline']}'" for row in rows if row["baseline"]))
        lines.append(
            f"p: paired t-test over the seeds of the test accuracy against {baselines}, adjusted for the "
            f"number of rows (Holm); {_verdict(rows)}."
        )
    if equal := [f"'{row['name']}'" for row in rows if row["p_value"] == 0]:
        lines.append(
            f"All seeds of {', '.join(equal)} differ by the same from the baseline's, so p is 0 without a test: "
            "with few seeds that happens by chance."
        )
    if any(row["at_end_of_grid"] for row in rows):
        lines.append("* at the end of its grid: a wider --lrs may give a better result.")
    return lines


def _verdict(rows: Sequence[Row]) -> str:
    names = [
        f"'{row['name']}'" for row in rows if row["p_value_holm"] is not None and row["p_value_holm"] < SIGNIFICANT
    ]
    return f"below {SIGNIFICANT}: {', '.join(names) or 'none'}"


def _with_error(row: Row, key: str, precision: str) -> str:
    mean, error = row[key], row[f"{key}_error"]
    if mean is None:
        return "not finite"
    return f"{mean:{precision}}" + (f" ± {error:{precision}}" if error is not None else "")


def _to_target(row: Row, key: str, precision: str) -> str:
    """Returns the mean of the runs that have reached the target, and how many if not all have."""
    if not row["reached_target"]:
        return "never"
    some = row["reached_target"] < row["seeds"]
    return _with_error(row, key, precision) + (f" ({row['reached_target']} of {row['seeds']})" if some else "")


def _significance(row: Row) -> str:
    value: Any = row["p_value_holm"]
    if value is None:
        return ""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _first_and_last(row: Row) -> str:
    norms = row["gradient_norms"][0]
    return " / ".join("not finite" if norm is None else f"{norm:.1e}" for norm in (norms[0], norms[-1]))


def _format(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_line(line, widths) for line in lines]
    text.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(text)


def _line(values: Sequence[str], widths: Sequence[int]) -> str:
    return f"| {' | '.join(value.ljust(width) for value, width in zip(values, widths, strict=True))} |"
