"""`bench memory`: bytes per parameter on a rank by strategy, format of the state and number of ranks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hvd_adam.bench import launchers
from hvd_adam.bench.config import OURS, RELEASED, MemoryConfig
from hvd_adam.bench.interleave import Outcome, Plan, take_turns
from hvd_adam.bench.memory_worker import STEPS
from hvd_adam.bench.report import Column, Result
from hvd_adam.bench.stats import Row, ratio
from hvd_adam.bench.step_worker import build_model
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("parameters", "gradients", "state")

# Bytes of both moments of a float32 parameter, with the scales of 32 elements; small tensors keep 8 bytes.
MOMENTS = {"float32": 8.0, "8bit": 2.125}

COLUMNS = (
    Column("strategy", "strategy"),
    Column("state", "state_format"),
    Column("ranks", "np", "d"),
    *(Column(name, name, ".3f") for name in (*PARTS, "total")),
    Column("predicted", "predicted_total", ".3f"),
    Column("/ predicted", "to_predicted", ".3f"),
    Column("gradients, peak", "peak", ".3f"),
)


def measure(config: MemoryConfig) -> Result:
    """Trains a few steps with every strategy on every number of ranks, and counts the bytes held.

    Raises:
        UserError: an unknown model, fewer GPUs than ranks, or no Horovod.
    """
    count = sum(p.numel() for p in build_model(config.model).parameters())
    rows: list[Row] = []
    for ranks in config.rank_counts():
        task = {"kind": "memory", "model": config.model, "device": launchers.device(config, ranks)}
        plans: list[Plan] = [
            launchers.horovodrun(
                f"{strategy} {held}", {**task, "strategy": strategy, "state_format": held}, ranks, config.launcher
            )
            for strategy in (*STRATEGIES, RELEASED.removeprefix(OURS))
            for held in MOMENTS
        ]
        logger.info(f"{ranks} rank{'s' * (ranks > 1)}")
        outcomes = take_turns(plans, ranks=ranks, rounds=1, timeout=config.timeout, log=logger.info)
        for name, outcome in outcomes.items():
            strategy, held = name.split()
            rows.append(summarize(strategy, held, ranks, outcome, count))
    threads = ", ".join(str(launchers.threads(ranks)) for ranks in config.rank_counts())
    notes = [
        f"horovodrun --{config.launcher}, except for 1 rank; threads per rank: {threads}",
        f"{config.model}, {count:,} float32 parameters; bytes per parameter on the rank that holds most, after "
        f"{2 * STEPS} steps; whole buffers are counted, each once",
        "gradients, peak: the most that all p.grad and buffers of released buckets take in a step, counted each "
        "time that backward has completed a gradient",
        "predicted: 4 for the parameter, 4 for its gradient, 8 for Adam's moments, 2.125 if they are held "
        "in 8 bits (1/N of it if they are sharded); tensors that are small or have one dimension keep 8. Released "
        "gradients take nothing after a step",
    ]
    return Result(rows, COLUMNS, notes, partial(_draw, rows))


def predicted(strategy: str, ranks: int, state_format: str = "float32") -> dict[str, float] | None:
    """Returns the bytes per float32 parameter on a rank, by part; None for an unknown strategy."""
    moments = MOMENTS[state_format]
    released = strategy == RELEASED.removeprefix(OURS)
    state = moments / ranks if strategy == "sharded" else moments
    known = strategy in STRATEGIES or released
    return {"parameters": 4.0, "gradients": 0.0 if released else 4.0, "state": state} if known else None


def summarize(strategy: str, state_format: str, ranks: int, outcome: Outcome, count: int) -> Row:
    """Returns the row of a strategy.

    Args:
        strategy: name of the strategy.
        state_format: how the moments are held.
        ranks: number of ranks.
        outcome: the bytes of each part, or an error.
        count: number of parameters of the model.
    """
    row: Row = {"strategy": strategy, "state_format": state_format, "np": ranks}
    if outcome.error is not None:
        return {**row, "error": outcome.error}
    row |= {name: max(outcome.times[name]) / count for name in (*PARTS, "total", "peak")}
    prediction = predicted(strategy, ranks, state_format)
    row |= {f"predicted_{name}": prediction[name] if prediction else None for name in PARTS}
    row["predicted_total"] = sum(prediction.values()) if prediction else None
    row["to_predicted"] = ratio(row["total"], row["predicted_total"])
    return row


def _draw(rows: list[Row], figure: Figure) -> None:
    axis = figure.subplots()
    measured = [row for row in rows if "error" not in row]
    labels = [f"{row['strategy']} {row['state_format']}, {row['np']}" for row in measured]
    bottom = [0.0] * len(measured)
    for part in PARTS:
        sizes = [row[part] for row in measured]
        axis.bar(labels, sizes, bottom=bottom, label=part)
        bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    predictions = [(label, row["predicted_total"]) for label, row in zip(labels, measured, strict=True)]
    known = [prediction for prediction in predictions if prediction[1] is not None]
    axis.plot([label for label, _ in known], [total for _, total in known], "k_", markersize=30, label="predicted")
    axis.set(xlabel="strategy, ranks", ylabel="bytes per parameter")
    axis.legend()
