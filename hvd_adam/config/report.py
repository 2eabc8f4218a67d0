"""`ReportConfig`: the options of `python -m hvd_adam.report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hvd_adam.config.options import option
from hvd_adam.errors import UserError

MOST_RUNS = 20  # their colors, and the page's size, stay readable


@dataclass(frozen=True)
class ReportConfig:
    """Writes one HTML page that shows runs: curves, scores, configurations and their differences."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.report runs/first
  python -m hvd_adam.report runs/first runs/second --output comparison.html"""

    runs: tuple[str, ...] = option((), f"1 to {MOST_RUNS} run folders", path=True, positional="RUN")
    output: str = option("report.html", "the page to write", path=True)
    force: bool = option(False, "replace the page if it exists")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run folder given: write one or more, as in runs/first runs/second")
        if len(self.runs) > MOST_RUNS:
            raise UserError(f"{len(self.runs)} run folders given: give at most {MOST_RUNS}")
