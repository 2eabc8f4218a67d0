"""Statistics of measured times. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile of at least one value, interpolated."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def timing(seconds: Sequence[float]) -> Row:
    """Returns the median and the quartiles of times, in milliseconds, and the number of samples."""
    low, median, high = (value * 1e3 for value in quartiles(seconds))
    return {"median_ms": median, "low_ms": low, "high_ms": high, "samples": len(seconds)}


def slowest(ranks: Iterable[Sequence[float]]) -> list[float]:
    """Returns the time of each step on its slowest rank; every rank must have timed the same steps."""
    return [max(step) for step in zip(*ranks, strict=True)]


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Returns a quotient; None if a value is missing or the denominator is zero."""
    return None if numerator is None or not denominator else numerator / denominator


def add_ratio(rows: Iterable[Row], key: str, peer: Mapping[str, Any] | None) -> None:
    """Sets row[key] to the row's median over the peer's median; below 1 means faster than the peer."""
    for row in rows:
        row[key] = ratio(row.get("median_ms"), peer.get("median_ms") if peer else None)


def bus_bytes(ranks: int, size: float) -> float:
    """Returns the bytes that each rank must send, and receive, to sum `size` bytes over all ranks: 2(N−1)/N·S."""
    return 2 * (ranks - 1) / ranks * size
