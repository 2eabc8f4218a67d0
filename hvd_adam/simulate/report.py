"""The output of `predict`: a table, a plot, and one HTML page without any request to the network."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from pathlib import Path

from hvd_adam._version import __version__
from hvd_adam.simulate.forecast import Forecast
from hvd_adam.simulate.step import PARTS

MOST_ADVICE = 2  # in the table


def header(forecasts: Sequence[Forecast]) -> list[str]:
    """Returns the headings of the columns."""
    price = ["per 1M samples"] if forecasts[0].price is not None else []
    return [
        *("ranks", "step ms", "± ms", "samples/s", "efficiency", "MB sent a rank", "MB sent a host"),
        *("GB memory", *price, "bottleneck", "what would help most"),
    ]


def cells(row: Forecast) -> list[str]:
    """Returns the cells of one forecast. Throughput and efficiency have the relative error of the step."""
    relative = row.error / row.step.seconds
    advice = "; ".join(f"{name} +{gain:.0%}" for name, gain in row.advice[:MOST_ADVICE]) or "-"
    price = [] if row.price is None else [f"{row.price:,.2f} ± {row.price * relative:,.2f}"]
    return [
        f"{row.ranks:,}",
        f"{row.step.seconds * 1e3:,.1f}",
        f"{row.error * 1e3:,.1f}",
        f"{row.throughput:,.0f} ± {row.throughput * relative:,.0f}",
        f"{row.efficiency:.1%} ± {row.efficiency * relative:.1%}",
        f"{row.step.sent / 1e6:,.2f}",
        f"{row.step.sent_by_host / 1e6:,.2f}",
        f"{row.memory / 1e9:.3f}",
        *price,
        row.bottleneck,
        advice,
    ]


def table(forecasts: Sequence[Forecast], notes: Sequence[str]) -> str:
    """Returns a fixed-width table and the notes."""
    return "\n".join([*aligned(header(forecasts), [*map(cells, forecasts)], texts=2), "", *notes, ""])


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, texts: int) -> list[str]:
    """Returns the lines of a fixed-width table.

    Args:
        head: headings of the columns.
        rows: their cells.
        texts: number of last columns that are text, to the left; the others are numbers, to the right.
    """
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = len(head) - texts

    def line(row: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if place < numbers else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return [*map(line, lines)]


def png(forecasts: Sequence[Forecast]) -> bytes:
    """Returns a picture: throughput next to the ideal, and the parts of a step."""
    from matplotlib.figure import Figure  # here: it takes a second to load

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, parts = figure.subplots(1, 2)
    ranks = [row.ranks for row in forecasts]
    ideal = [row.throughput / row.efficiency for row in forecasts]
    errors = [row.throughput * row.error / row.step.seconds for row in forecasts]
    speed.plot(ranks, ideal, "--", color="gray", label="ideal")
    speed.errorbar(ranks, [row.throughput for row in forecasts], errors, marker="o", label="predicted")
    speed.set(xscale="log", yscale="log", xlabel="ranks", ylabel="samples/s")
    speed.legend()
    bottom = [0.0] * len(forecasts)
    for part in PARTS:
        values = [row.step.parts[part] * 1e3 for row in forecasts]
        parts.bar([f"{n:,}" for n in ranks], values, bottom=bottom, label=part)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    parts.set(xlabel="ranks", ylabel="ms of a step")
    parts.tick_params(axis="x", rotation=60)
    parts.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()


def page(forecasts: Sequence[Forecast], notes: Sequence[str]) -> str:
    """Returns the page, with its picture inside."""
    import jinja2  # here: only a page needs it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        header=header(forecasts),
        rows=[cells(row) for row in forecasts],
        picture=base64.b64encode(png(forecasts)).decode(),
        last=forecasts[-1],
        notes=notes,
        version=__version__,
        written=time.strftime("%Y-%m-%d"),
    )
