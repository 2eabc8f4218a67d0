"""`bench step`: whole training steps of every variant, interleaved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_adam.bench import launchers
from hvd_adam.bench.config import StepConfig
from hvd_adam.bench.interleave import Outcome, take_turns
from hvd_adam.bench.report import TIMES, Column, Result, bars
from hvd_adam.bench.stats import Row, add_ratio, timing
from hvd_adam.bench.step_worker import build_model
from hvd_adam.bench.timer import WARM_UP_CALLS
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    Column("model", "model"),
    Column("variant", "variant"),
    *TIMES,
    Column("images/s", "images_per_s", ".1f"),
    Column("/ ddp-fused", "to_ddp_fused", ".2f"),
    Column("/ horovod", "to_horovod", ".2f"),
    Column("/ plain", "to_plain", ".3f"),
    Column("/ compute", "to_compute", ".2f"),
)


def measure(config: StepConfig) -> Result:
    """Trains every model with every variant.

    Raises:
        UserError: an unknown model or variant, fewer GPUs than ranks, or no Horovod.
    """
    variants = config.variant_names(STRATEGIES)
    device = launchers.device(config, config.np)
    sizes = {name: sum(p.numel() for p in build_model(name).parameters()) for name in config.model_names()}
    rows: list[Row] = []
    for model in sizes:
        options = ("batch_size", "steps", "precision", "channels_last", "compile")
        task = {
            "kind": "step",
            "model": model,
            "device": device,
            **{name: getattr(config, name) for name in options},
        }
        plans = [
            launchers.horovodrun(variant, {**task, "variant": variant}, config.np, config.launcher)
            for variant in variants
        ]
        logger.info(f"model {model}")
        outcomes = take_turns(
            plans, ranks=config.np, rounds=config.repeats, timeout=config.timeout, log=logger.info
        )
        rows += summarize(model, outcomes, config.np * config.batch_size)

    def draw(figure: Figure) -> None:
        bars(figure, {model: [row for row in rows if row["model"] == model] for model in sizes}, "variant")

    return Result(rows, COLUMNS, _notes(config, device, sizes), draw)


def summarize(model: str, outcomes: dict[str, Outcome], images: int) -> list[Row]:
    """Returns one row per variant.

    Args:
        model: name of the model.
        outcomes: by variant.
        images: images per step over all ranks.
    """
    rows: list[Row] = []
    for variant, outcome in outcomes.items():
        row: Row = {"model": model, "variant": variant}
        if outcome.error is None:
            row |= timing(outcome.times["step"])
            row["images_per_s"] = images / row["median_ms"] * 1e3
        else:
            row["error"] = outcome.error
        rows.append(row)
    by_variant = {row["variant"]: row for row in rows}
    for peer in ("ddp-fused", "horovod", "plain", "compute"):
        add_ratio(rows, f"to_{peer.replace('-', '_')}", by_variant.get(peer))
    return rows


def _notes(config: StepConfig, device: str, sizes: dict[str, int]) -> list[str]:
    counts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.items())
    applied = [config.precision, *(["channels-last"] if config.channels_last else [])]
    applied += ["torch.compile"] if config.compile else []
    value = "each the time" if device == "cpu" else "the mean of a turn's steps"
    notes = [
        f"{launchers.description(config.np, config.launcher)}, on {device}, {launchers.threads(config.np)} "
        f"threads and {config.batch_size} images of 3x32x32 per rank; {', '.join(applied)}; parameters: {counts}",
        f"medians and quartiles of {config.repeats} interleaved turns × {config.steps} steps, {value} on the "
        f"slowest rank; before them one turn, and {WARM_UP_CALLS} steps of each turn, that are not counted",
        "ratios of times (below 1: faster). horovod: hvd.DistributedOptimizer around torch.optim.Adam's default; "
        "plain: torch.optim.Adam fused, no distribution; compute: no distribution and no optimizer, a lower bound",
    ]
    if device == "cuda":
        notes.append("the steps of a turn are queued back to back and synchronized once at the end")
    return notes
