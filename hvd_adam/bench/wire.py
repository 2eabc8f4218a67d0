"""`bench wire`: what each compression of gradients costs and gains, compared with DDP and its hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from hvd_adam.bench import launchers
from hvd_adam.bench.config import DEFERRED, OURS
from hvd_adam.bench.interleave import Outcome, Plan, take_turns
from hvd_adam.bench.link import INTERFACE, limited_link
from hvd_adam.bench.report import TIMES, Column, Result, bars
from hvd_adam.bench.stats import Row, add_ratio, quartiles, ratio, timing
from hvd_adam.bench.step_worker import build_model
from hvd_adam.bench.timer import WARM_UP_CALLS
from hvd_adam.bench.wire_bytes import POWERSGD_RANK, predicted_bytes
from hvd_adam.bench.wire_config import WireConfig
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.distributed.automatic.candidates import ANY
from hvd_adam.distributed.gradients.compression import COMPRESSIONS
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    Column("model", "model"),
    Column("link", "link"),
    Column("variant", "variant"),
    *TIMES,
    Column("/ none", "to_none", ".3f"),
    Column("/ ddp", "to_ddp", ".3f"),
    Column("MB at interface", "interface_mb", ".3f"),
    Column("MB sent", "sent_mb", ".3f"),
    Column("MB formula", "formula_mb", ".3f"),
    Column("/ formula", "to_formula", ".3f"),
    Column("error", "gradient_error", ".1e"),
    Column("chosen", "chosen"),
)
NO_LINK = "none"

VARIANTS = tuple(f"{OURS}{strategy}-{name}" for strategy in STRATEGIES for name in (*COMPRESSIONS, ANY))


def measure(config: WireConfig) -> Result:
    """Trains every model with every variant over every link.

    Raises:
        UserError: an unknown model or variant, fewer GPUs than ranks, no Horovod, or this machine allows no link.
    """
    device = "cpu" if config.link else launchers.device(config, config.np)
    variants = config.variant_names(VARIANTS, device)
    models = {name: build_model(name) for name in config.model_names()}
    rows: list[Row] = []
    links: dict[str, int | None] = {**config.rates()} or {NO_LINK: None}
    for link, rate in links.items():
        for name, model in models.items():
            logger.info(f"model {name}, link {link}")
            task: dict[str, Any] = {
                "kind": "wire",
                "model": name,
                "device": device,
                "batch_size": config.batch_size,
                "steps": config.steps,
                "interface": None if rate is None else INTERFACE,
            }
            plans = [
                launchers.horovodrun(variant, {**task, "variant": variant}, config.np, config.launcher)
                for variant in variants
            ]
            with _connected(plans, rate) as connected:
                outcomes = take_turns(
                    connected, ranks=config.np, rounds=config.repeats, timeout=config.timeout, log=logger.info
                )
            rows += summarize(name, link, model, outcomes, config)

    def draw(figure: Figure) -> None:
        panels: dict[str, list[Row]] = {}
        for row in rows:
            panels.setdefault(f"{row['model']}, link {row['link']}", []).append(row)
        bars(figure, panels, "variant")

    return Result(rows, COLUMNS, _notes(config, device, models), draw)


@contextmanager
def _connected(plans: list[Plan], rate: int | None) -> Iterator[list[Plan]]:
    if rate is None:
        yield plans
        return
    with limited_link(rate) as link:
        yield [link.over(plan) for plan in plans]


def summarize(
    name: str, link: str, model: nn.Module, outcomes: dict[str, Outcome], config: WireConfig
) -> list[Row]:
    """Returns one row per variant.

    Args:
        name: name of the model.
        link: name of the link.
        model: the model.
        outcomes: by variant.
        config: with number of ranks and launcher.
    """
    rows: list[Row] = []
    for variant, outcome in outcomes.items():
        row: Row = {"model": name, "link": link, "variant": variant}
        rows.append(row)
        if outcome.error is not None:
            row["error"] = outcome.error
            continue
        row |= timing(outcome.times["step"])
        used = variant.removesuffix(DEFERRED)
        if "choice" in outcome.times:
            row["chosen"] = COMPRESSIONS[round(outcome.times["choice"][0])]
            used = used.replace(ANY, row["chosen"])
        if "gradient_error" in outcome.times:
            row["gradient_error"] = outcome.times["gradient_error"][0]
        row["formula_mb"] = predicted_bytes(used, model, config.np) / 1e6
        if "payload" in outcome.times:
            for key, measured in (("interface_mb", "interface"), ("sent_mb", "payload")):
                row[key] = quartiles(outcome.times[measured])[1] / 1e6
            row["to_formula"] = ratio(row["sent_mb"], row["formula_mb"])
    by_variant = {row["variant"]: row for row in rows}
    add_ratio(rows, "to_none", by_variant.get(f"{OURS}allreduce-none"))
    add_ratio(rows, "to_ddp", by_variant.get("ddp"))
    return rows


def _notes(config: WireConfig, device: str, models: dict[str, nn.Module]) -> list[str]:
    sizes = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    counts = ", ".join(f"{name} {size:.1f} M" for name, size in sizes.items())
    notes = [
        f"{launchers.description(config.np, config.launcher)}, on {device}, {launchers.threads(config.np)} "
        f"threads and {config.batch_size} images of 3x32x32 per rank; parameters: {counts}",
        f"medians and quartiles of {config.repeats} interleaved turns × {config.steps} steps, each the time on "
        f"the slowest rank; before them one turn, and {WARM_UP_CALLS} steps of each turn, that are not counted",
        f"/ none: of {OURS}allreduce-none; ddp: DistributedDataParallel with torch's fused Adam, and its hooks "
        f"for fp16, bf16 and PowerSGD (rank {POWERSGD_RANK}, in one bucket)",
        "formula: what a rank sends in a step, without headers (docs: Compressed gradients); error: 2-norm of the "
        "averaged gradient's error over that of the gradient, in one step without residuals",
        f"{ANY}: after its trial, with what it has chosen",
    ]
    if device == "cpu":
        notes.append("ddp-bf16: PyTorch accepts this hook with NCCL only")
    if config.link:
        notes.append(
            "link: two network namespaces of this machine, each direction limited by tc tbf, headers of packets "
            "of 1500 bytes included; at interface: counted by the kernel before it divides large packets; sent: "
            "without the headers of what is counted"
        )
    else:
        notes.append("bytes are counted with --link only: ranks on one host may share memory")
    return notes
