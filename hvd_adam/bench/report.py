"""The output of a benchmark: the machine, a fixed-width table or one JSON object, and a plot."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvd_adam import __version__
from hvd_adam.bench.config import BenchConfig
from hvd_adam.bench.stats import Row
from hvd_adam.checkpoint.output import whole_file
from hvd_adam.distributed.placement import cores, cpu_model
from hvd_adam.versions import installed_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        head: heading of the column.
        key: key of the value in a row.
        format: format specification of numbers; "" for text.
    """

    head: str
    key: str
    format: str = ""

    def text(self, row: Row) -> str:
        """Returns the cell of a row; "-" if the row has no such value."""
        value = row.get(self.key)
        return "-" if value is None else value if isinstance(value, str) else format(value, self.format)


TIMES = (
    Column("median ms", "median_ms", ".3f"),
    Column("25 %", "low_ms", ".3f"),
    Column("75 %", "high_ms", ".3f"),
)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a benchmark.

    Attributes:
        rows: one per measurement, in display order; a row with "error" could not be measured.
        columns: the columns of the table.
        notes: how the numbers were measured and what they mean, one line each.
        draw: draws the rows into a figure.
    """

    rows: list[Row]
    columns: Sequence[Column]
    notes: list[str]
    draw: Callable[[Figure], None]


def machine(load: float) -> dict[str, Any]:
    """Returns the hardware and the versions of the software.

    Args:
        load: load average over the minute before the start of the benchmark.
    """
    import torch

    return {
        "cpu": cpu_model(),
        "cores": len(cores()),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "horovod": installed_version("horovod", "") or None,
        "mpi": _mpi_version(),
        "hvd_adam": __version__,
        "load_average": round(load, 2),
    }


def describe(machine: dict[str, Any]) -> str:
    """Describes the machine in three lines."""
    gpu = f"{machine['gpus']} × {machine['gpu']}" if machine["gpu"] else "none"
    return (
        f"CPU      {machine['cpu']}, {machine['cores']} cores, "
        f"load average {machine['load_average']} at the start\n"
        f"GPU      {gpu}\n"
        f"versions hvd_adam {machine['hvd_adam']}, Python {machine['python']}, torch {machine['torch']}, "
        f"CUDA {machine['cuda'] or 'none'}, Horovod {machine['horovod'] or 'none'}, {machine['mpi'] or 'no MPI'}"
    )


def show(command: str, config: BenchConfig, machine: dict[str, Any], result: Result) -> None:
    """Prints a result in the configured format, and then draws the plot if one is configured.

    Raises:
        UserError: the plot cannot be written; the result has been printed.
    """
    _print(command, config, machine, result)
    if config.plot:
        plot(Path(config.plot), f"hvd_adam.bench {command}: {machine['gpu'] or machine['cpu']}", result)
        if not config.json:
            print(f"plot {config.plot}")


def _print(command: str, config: BenchConfig, machine: dict[str, Any], result: Result) -> None:
    if config.json:
        settings = dataclasses.asdict(config)
        shown = {"command": command, "machine": machine, "config": settings, "rows": result.rows}
        print(json.dumps({**shown, "notes": result.notes}))
        return
    print(f"\n{table(result.columns, result.rows)}\n")
    for row in result.rows:
        if "error" in row:
            print(f"failed: {row['error']}")
    for note in result.notes:
        print(note)


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Formats rows in columns of fixed width: text left-aligned, numbers right-aligned."""
    cells = [[column.head for column in columns], *([column.text(row) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = (
            f"{cell:>{width}}" if column.format else f"{cell:<{width}}"
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def plot(path: Path, title: str, result: Result) -> None:
    """Draws a result into a PNG file.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 5), layout="constrained")
    figure.suptitle(title)
    result.draw(figure)
    with whole_file("--plot", path) as draft:
        figure.savefig(draft, dpi=120)
    pyplot.close(figure)


def bars(figure: Figure, panels: dict[str, list[Row]], name: str) -> None:
    """Draws up to three panels side by side, each with one bar per row: its median, and its quartiles as a line.

    Args:
        figure: the figure to draw into.
        panels: rows by title of the panel; rows without a median are left out.
        name: key of the label of a bar.
    """
    lines = -(-len(panels) // 3)
    figure.set_size_inches(10, 5 if lines == 1 else 3 * lines)
    axes = [figure.add_subplot(lines, min(3, len(panels)), number + 1) for number in range(len(panels))]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        rows = [row for row in rows if row.get("median_ms") is not None]
        medians = [row["median_ms"] for row in rows]
        spread = [
            [row["median_ms"] - row["low_ms"] for row in rows],
            [row["high_ms"] - row["median_ms"] for row in rows],
        ]
        colors = ["tab:orange" if str(row[name]).startswith("hvd_adam") else "tab:blue" for row in rows]
        axis.barh([row[name] for row in rows], medians, xerr=spread, color=colors)
        axis.invert_yaxis()  # the first row on top, as in the table
        axis.set(title=title, xlabel="ms")


def _mpi_version() -> str | None:
    # Not from mpi4py: a process that has initialized MPI cannot start mpirun.
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        return None
    output = subprocess.run([mpirun, "--version"], capture_output=True, text=True, check=False).stdout
    return output.splitlines()[0].replace("mpirun (", "").replace(")", "") if output else None
