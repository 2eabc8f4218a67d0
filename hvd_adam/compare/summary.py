"""From the results of the runs to the rows of the table: chooses learning rates, averages over seeds, tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from hvd_adam.compare.cells import Cell, Result
from hvd_adam.compare.statistics import estimate, holm, paired_p_value
from hvd_adam.compare.studies import Arm

Row = dict[str, Any]


def summarize(arms: Sequence[Arm], results: Mapping[Cell, Result], target: float) -> list[Row]:
    """Returns a row of JSON values for each arm.

    Args:
        arms: the rows.
        results: of all their runs.
        target: the validation accuracy to which updates and seconds are counted.
    """
    rows = [_row(arm, results, target) for arm in arms]
    by_name = {row["name"]: row for row in rows}
    compared = [row for row in rows if row["baseline"] is not None]
    p_values = [
        paired_p_value(row["test_accuracies"], by_name[row["baseline"]]["test_accuracies"]) for row in compared
    ]
    for row, p_value, adjusted in zip(compared, p_values, holm(p_values), strict=True):
        row["p_value"], row["p_value_holm"] = p_value, adjusted
    return rows


def choose_lr(arm: Arm, results: Mapping[Cell, Result]) -> float:
    """Returns the learning rate with the fewest diverged runs, then the best validation accuracy, then loss."""

    def rank(lr: float) -> tuple[float, float, float]:
        of_lr = [results[cell] for cell in arm.cells[lr]]
        losses = [math.inf if result["validation_loss"] is None else result["validation_loss"] for result in of_lr]
        accuracy = math.fsum(result["validation_accuracy"] for result in of_lr)
        return sum(result["diverged"] is not None for result in of_lr), -accuracy, sum(losses)

    return min(arm.cells, key=rank)


def _row(arm: Arm, results: Mapping[Cell, Result], target: float) -> Row:
    lr = choose_lr(arm, results)
    grid = sorted(arm.cells)
    chosen = [results[cell] for cell in arm.cells[lr]]
    reached = [point for result in chosen if (point := _first_at(result["curve"], target)) is not None]
    accuracy, loss = (estimate([result[key] for result in chosen]) for key in ("test_accuracy", "test_loss"))
    updates, seconds = (estimate([point[index] for point in reached]) for index in (0, 1))
    return {
        "name": arm.name,
        "optimizer": arm.optimizer,
        "baseline": arm.baseline,
        "batch_size": arm.batch_size,
        "rule": arm.rule,
        "lr": lr,
        "at_end_of_grid": len(grid) > 1 and lr in (grid[0], grid[-1]),
        "grid": [
            {"lr": rate, "validation_accuracy": _mean(results, arm.cells[rate], "validation_accuracy")}
            for rate in grid
        ],
        "validation_accuracy": _mean(results, arm.cells[lr], "validation_accuracy"),
        "test_accuracy": accuracy.mean,
        "test_accuracy_error": accuracy.error,
        "test_accuracies": [result["test_accuracy"] for result in chosen],
        "test_loss": loss.mean,
        "test_loss_error": loss.error,
        "diverged": sum(result["diverged"] is not None for result in chosen),
        "seeds": len(chosen),
        "reached_target": len(reached),
        "updates_to_target": updates.mean,
        "updates_to_target_error": updates.error,
        "seconds_to_target": seconds.mean,
        "seconds_to_target_error": seconds.error,
        "p_value": None,
        "p_value_holm": None,
        "gradient_norms": [_median_norms([result["gradient_norms"][end] for result in chosen]) for end in (0, -1)],
        "curve": _mean_curve([result["curve"] for result in chosen]),
    }


def _mean(results: Mapping[Cell, Result], cells: Sequence[Cell], key: str) -> float | None:
    return estimate([results[cell][key] for cell in cells]).mean


def _first_at(curve: Sequence[Sequence[Any]], target: float) -> Sequence[Any] | None:
    """Returns the first point of a curve with the accuracy `target`."""
    return next((point for point in curve if point[2] >= target), None)


def _median_norms(of_runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Returns the median over runs of each layer's norm; None where one is not finite."""
    columns = ([norm for norm in column if norm is not None] for column in zip(*of_runs, strict=True))
    return [median(known) if len(known) == len(of_runs) else None for known in columns]


def _mean_curve(curves: Sequence[Sequence[Sequence[Any]]]) -> list[list[float | None]]:
    """Returns updates, mean validation accuracy and its standard error, up to the end of the shortest curve."""
    points = zip(*curves, strict=False)  # a run that diverged has fewer
    return [[point[0][0], *estimate([value[2] for value in point])] for point in points]
