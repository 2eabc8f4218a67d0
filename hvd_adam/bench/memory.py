"""`bench memory`: bytes per parameter on a rank by strategy and number of ranks, compared with the prediction."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hvd_adam.bench import launchers
from hvd_adam.bench.config import MemoryConfig
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

COLUMNS = (
    Column("strategy", "strategy"),
    Column("ranks", "np", "d"),
    *(Column(name, name, ".3f") for name in (*PARTS, "total")),
    Column("predicted", "predicted_total", ".3f"),
    Column("/ predicted", "to_predicted", ".3f"),
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
            launchers.horovodrun(strategy, {**task, "strategy": strategy}, ranks, config.launcher)
            for strategy in STRATEGIES
        ]
        logger.info(f"{ranks} rank{'s' * (ranks > 1)}")
        outcomes = take_turns(plans, ranks=ranks, rounds=1, timeout=config.timeout, log=logger.info)
        rows += [summarize(strategy, ranks, outcome, count) for strategy, outcome in outcomes.items()]
    threads = ", ".join(str(launchers.threads(ranks)) for ranks in config.rank_counts())
    notes = [
        f"horovodrun --{config.launcher}, except for 1 rank; threads per rank: {threads}",
        f"{config.model}, {count:,} float32 parameters; bytes per parameter on the rank that holds most, after "
        f"{2 * STEPS} steps; whole buffers are counted, each once",
        "predicted: 4 for the parameter, 4 for its gradient, 8 for Adam's moments (8/N if they are sharded)",
    ]
    return Result(rows, COLUMNS, notes, partial(_draw, rows))


def predicted(strategy: str, ranks: int) -> dict[str, float] | None:
    """Returns the bytes per float32 parameter on a rank, by part; None for an unknown strategy."""
    state = {"allreduce": 8.0, "sharded": 8.0 / ranks}.get(strategy)
    return None if state is None else {"parameters": 4.0, "gradients": 4.0, "state": state}


def summarize(strategy: str, ranks: int, outcome: Outcome, count: int) -> Row:
    """Returns the row of a strategy.

    Args:
        strategy: name of the strategy.
        ranks: number of ranks.
        outcome: the bytes of each part, or an error.
        count: number of parameters of the model.
    """
    row: Row = {"strategy": strategy, "np": ranks}
    if outcome.error is not None:
        return {**row, "error": outcome.error}
    row |= {name: max(outcome.times[name]) / count for name in (*PARTS, "total")}
    prediction = predicted(strategy, ranks)
    row |= {f"predicted_{name}": prediction[name] if prediction else None for name in PARTS}
    row["predicted_total"] = sum(prediction.values()) if prediction else None
    row["to_predicted"] = ratio(row["total"], row["predicted_total"])
    return row


def _draw(rows: list[Row], figure: Figure) -> None:
    axis = figure.subplots()
    measured = [row for row in rows if "error" not in row]
    labels = [f"{row['strategy']}, {row['np']}" for row in measured]
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
