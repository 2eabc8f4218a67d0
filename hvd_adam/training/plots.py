"""`curves.png`: loss, test accuracy, learning rate and throughput of a run."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from hvd_adam.training.run_log import METRICS_FILE, read_events

PLOT_FILE = "curves.png"
CROSS_ENTROPY = "cross-entropy"


def plot(folder: Path) -> Path:
    """Plots the events in `metrics.jsonl`, each quantity in a panel of its own; returns the path of `curves.png`.

    Args:
        folder: the run folder.

    Raises:
        OSError: the plot cannot be written.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a folder's name in letters that no font has
        figure(folder).savefig(folder / PLOT_FILE, dpi=120)
    return folder / PLOT_FILE


def try_plot(folder: Path) -> Path | str:
    """Calls `plot`; returns the path, or why it failed, for example because the disk is full."""
    try:
        return plot(folder)
    except OSError as error:  # the metrics have all that the plot shows
        return f"not drawn: {error.strerror}"


def figure(folder: Path) -> Any:
    """Returns the matplotlib figure of a run folder."""
    from matplotlib.figure import Figure  # without pyplot, which takes half a second more to import

    events = list(read_events(folder / METRICS_FILE))
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "eval"]
    drawn = Figure(figsize=(10, 7))
    drawn.subplots_adjust(left=0.09, right=0.98, top=0.91, bottom=0.08, wspace=0.28, hspace=0.3)
    drawn.suptitle(_title(folder, events), parse_math=False)
    (loss, accuracy), (rate, throughput) = drawn.subplots(2, 2, sharex=True)
    _draw(loss, steps, "loss", "training")
    _draw(loss, evaluations, "test_loss", "test", "o-")
    _set_loss_scale(loss, _column(steps, "loss") + _column(evaluations, "test_loss"))
    _label(loss, "loss", _unit_of_loss(events))
    _draw(accuracy, evaluations, "test_accuracy", "accuracy", "o-")
    _draw(accuracy, evaluations, "test_balanced_accuracy", "balanced accuracy", "s--")
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")
    _label(accuracy, "test accuracy", "correct (%)")
    _draw(rate, steps, "lr")
    rate.set_ylim(bottom=0)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label(rate, "learning rate", "learning rate")
    _draw(throughput, steps, "images_per_second")
    throughput.set_ylim(bottom=0)
    throughput.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    _label(throughput, "throughput of all ranks", "images/s")
    return drawn


def _title(folder: Path, events: list[dict[str, Any]]) -> str:
    """Returns the run's name, and its ranks and images per update where the events have them."""
    starts = [event for event in events if event["event"] in ("start", "resume")]
    name = folder.resolve().name.encode(errors="replace").decode()  # fonts draw valid Unicode only
    if not starts:
        return name
    ranks = starts[-1]["world_size"]
    return f"{name}: {ranks} rank{'s' * (ranks != 1)}, {starts[-1]['global_batch_size']} images per update"


def _unit_of_loss(events: list[dict[str, Any]]) -> str:
    names = [
        event.get("loss_function", CROSS_ENTROPY) for event in events if event["event"] in ("start", "resume")
    ]
    return f"{CROSS_ENTROPY} (nats)" if set(names) <= {CROSS_ENTROPY} else names[-1]


def _draw(axes: Any, events: list[dict[str, Any]], name: str, label: str = "", style: str = "-") -> None:
    """Draws a value of the events over their updates, unless no event has it."""
    values = _column(events, name)
    if any(map(math.isfinite, values)):
        axes.plot([event["step"] for event in events], values, style, label=label, markersize=3, linewidth=1.2)
        if label:
            axes.legend()


def _label(axes: Any, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(title=title, xlabel="updates", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelbottom=True)  # the upper panels share the axis of the lower ones
    axes.grid(alpha=0.3)


def _set_loss_scale(axes: Any, values: list[float]) -> None:
    """Chooses a logarithmic scale with plain numbers at its ticks, if the losses differ by a factor of 3."""
    from matplotlib.ticker import LogLocator, NullFormatter

    positive = [value for value in values if math.isfinite(value) and value > 0]
    if not positive or max(positive) < 3 * min(positive):
        return
    axes.set_yscale("log")
    # Within a few powers of ten, those alone would be one or two ticks.
    subs = (1.0, 2.0, 5.0) if max(positive) < 1e4 * min(positive) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _column(events: list[dict[str, Any]], name: str) -> list[float]:
    values = [event.get(name) for event in events]  # an older release may have written the event without the value
    return [math.nan if value is None else value for value in values]
