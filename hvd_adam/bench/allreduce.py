"""`bench allreduce`: sums over the ranks by message size, compared with the bound of a ring."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hvd_adam.bench import launchers
from hvd_adam.bench.config import AllreduceConfig
from hvd_adam.bench.interleave import Outcome, Plan, take_turns
from hvd_adam.bench.report import TIMES, Column, Result
from hvd_adam.bench.stats import Row, add_ratio, bus_bytes, ratio, timing
from hvd_adam.bench.timer import WARM_UP_CALLS
from hvd_adam.distributed.context import HOROVOD_DEFAULTS
from hvd_adam.errors import UserError
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    Column("MB", "megabytes", "g"),
    Column("variant", "variant"),
    *TIMES,
    Column("bus GB/s", "bus_gb_per_s", ".3g"),
    Column("/ horovod", "to_horovod", ".2f"),
    Column("/ mpi", "to_mpi", ".2f"),
    Column("bound ms", "bound_ms", ".3f"),
    Column("/ bound", "to_bound", ".2f"),
)


def measure(config: AllreduceConfig) -> Result:
    """Times every variant at every size.

    Raises:
        UserError: fewer GPUs than ranks, or no Horovod.
    """
    device = launchers.device(config, config.np)
    variants, missing = plans(config, device)
    outcomes = take_turns(
        variants, ranks=config.np, rounds=config.repeats, timeout=config.timeout, log=logger.info
    )
    rows = [row for size in config.elements() for row in summarize(size, outcomes, config.np)]
    return Result(rows, COLUMNS, [*_notes(config, device), *missing], partial(_draw, rows))


def _notes(config: AllreduceConfig, device: str) -> list[str]:
    return [
        f"{config.np} ranks on {device}, horovodrun --{config.launcher} (mpi: mpirun), "
        f"{launchers.threads(config.np)} threads per rank; float32, summed in place",
        f"medians and quartiles of {config.repeats} interleaved turns × {config.calls} calls, each the time of "
        f"the slowest rank; not counted: a warm-up turn and the first {WARM_UP_CALLS} calls per size and turn",
        "bus GB/s: 2(N−1)/N·S/time, where 2(N−1)/N·S is what each of N ranks sends to sum S bytes in a ring",
        "bound: 2(N−1)/N·S/B, where B is the bus GB/s of `copy` at this size: S over the time in which one rank "
        "copies S bytes (torch.Tensor.copy_, each byte counted once) while all other ranks copy too",
        "hvd_adam step: optimizer.synchronize() for gradients of S bytes in total, after a backward pass with "
        "almost no computation, in which the first reductions start; with backward: from the start of that pass",
    ]


def _draw(rows: list[Row], figure: Figure) -> None:
    axis = figure.subplots()
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [row for row in rows if row["variant"] == variant and "error" not in row]
        bandwidths = [row["bus_gb_per_s"] for row in points]
        style = "k--" if variant == "copy" else "o-"
        axis.plot([row["megabytes"] for row in points], bandwidths, style, label=variant, markersize=3)
    axis.set(xlabel="MB", ylabel="bus GB/s", xscale="log", yscale="log")
    axis.legend()


def summarize(elements: int, outcomes: dict[str, Outcome], ranks: int) -> list[Row]:
    """Returns one row per variant at one message size.

    Args:
        elements: number of float32 in a message.
        outcomes: by variant; "copy" defines the bound.
        ranks: number of ranks.
    """
    size = 4 * elements
    rows: list[Row] = []
    for variant, outcome in outcomes.items():
        row: Row = {"megabytes": size / 1e6, "variant": variant}
        if outcome.error is not None:
            rows.append({**row, "error": outcome.error})
            continue
        sent = size if variant == "copy" else bus_bytes(ranks, size)
        keys = {str(elements): variant, f"{elements} backward": f"{variant} with backward"}
        for key, name in keys.items():
            if key in outcome.times:
                rows.append({**row, "variant": name, **timing(outcome.times[key])})
                rows[-1]["bus_gb_per_s"] = sent / rows[-1]["median_ms"] / 1e6
    by_variant = {row["variant"]: row for row in rows}
    sums = [row for row in rows if row["variant"] != "copy"]
    add_ratio(sums, "to_horovod", by_variant.get("horovod"))
    add_ratio(sums, "to_mpi", by_variant.get("mpi"))
    copied = by_variant.get("copy", {}).get("median_ms")
    for row in sums:
        if copied is not None:
            row["bound_ms"] = bus_bytes(ranks, size) / size * copied
            row["to_bound"] = ratio(row.get("median_ms"), row["bound_ms"])
    return rows


def plans(config: AllreduceConfig, device: str) -> tuple[list[Plan], list[str]]:
    """Returns the plans of the available variants, and one line on each variant that is not available."""
    task = {"kind": "allreduce", "elements": config.elements(), "calls": config.calls, "device": device}
    available = [
        launchers.horovodrun(name, {**task, "variant": name}, config.np, config.launcher)
        for name in ("copy", "hvd_adam step", "hvd_adam", "horovod", "torch")
    ]
    if device == "cuda":
        return available, ["mpi: not measured on GPUs: not every MPI can read their memory"]
    settings = {name: value for name, value in HOROVOD_DEFAULTS.items() if name.startswith("OMPI_MCA_")}
    missing = [] if settings else ["mpi-tuned: hvd_adam.init does not change the settings of Open MPI"]
    try:
        available.append(launchers.mpirun("mpi", {**task, "variant": "mpi"}, config.np, {}))
        if settings:
            available.append(launchers.mpirun("mpi-tuned", {**task, "variant": "mpi-tuned"}, config.np, settings))
    except UserError as error:
        missing.append(f"mpi: {error}")
    return available, missing
