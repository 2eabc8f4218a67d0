"""`bench adam`: one optimizer step without communication, beside a copy of as many bytes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from hvd_adam.bench.config import AdamConfig
from hvd_adam.bench.optimizers import Call, build, first_line, limits, release
from hvd_adam.bench.report import TIMES, Column, Result, bars, say
from hvd_adam.bench.stats import Row, add_ratio, ratio, timing
from hvd_adam.bench.timer import finisher, mean_seconds
from hvd_adam.bench.workloads import Workload, shapes
from hvd_adam.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_UP = 3

# On a GPU a candidate's turn is a block of calls, with one wait at its end: long enough that this wait does not
# count. A step that the host cannot launch as fast as the device makes it takes as long as its launches.
BLOCK_SECONDS = 0.01
MOST_CALLS = 1000

COLUMNS = (
    Column("workload", "workload"),
    Column("dtype", "dtype"),
    Column("threads", "threads", "d"),
    Column("optimizer", "name"),
    *TIMES,
    Column("GB/s", "gb_per_s", ".1f"),
    Column("/ torch fused", "to_torch_fused", ".2f"),
    Column("/ torch foreach", "to_torch_foreach", ".2f"),
    Column("bandwidth / copy's", "to_copy", ".2f"),
)


def measure(config: AdamConfig) -> Result:
    """Times every optimizer that can be had, all in turn, for each workload, dtype and number of threads.

    Raises:
        UserError: --device cuda where there is no GPU.
    """
    device = _device(config.device)
    names, kinds = config.workload_names(device.type), config.dtype_names(device.type)
    workloads = [Workload(name, kind, shapes(config, name), device) for name in names for kind in kinds]
    rows: list[Row] = []
    missing: list[str] = []
    for workload in workloads:
        measured, without = _measure(workload, config)
        rows += measured
        missing += without
        release(device)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        threads = f"\n{row['threads']} thread{'s' * (row['threads'] > 1)}" if device.type == "cpu" else ""
        panels.setdefault(f"{row['workload']}, {row['dtype']}{threads}", []).append(row)

    def draw(figure: Figure) -> None:
        bars(figure, panels, "name")

    return Result(rows, COLUMNS, [*_notes(workloads, config, device), *dict.fromkeys(missing)], draw)


def summarize(times: dict[str, list[float]], moved: int, labels: Row) -> list[Row]:
    """Makes a row of each candidate's times.

    Args:
        times: seconds by candidate; that of "copy" is the limit.
        moved: bytes that a step must read and write.
        labels: what all rows have in common.
    """
    rows = [{**labels, "name": name, **timing(seconds)} for name, seconds in times.items()]
    by_name = {row["name"]: row for row in rows}
    add_ratio(rows, "to_torch_fused", by_name.get("torch fused"))
    add_ratio(rows, "to_torch_foreach", by_name.get("torch foreach"))
    for row in rows:
        row["gb_per_s"] = moved / row["median_ms"] / 1e6
        row["to_copy"] = ratio(by_name.get("copy", {}).get("median_ms"), row["median_ms"])
    return rows


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _thread_counts(config: AdamConfig, device: torch.device) -> tuple[int, ...]:
    return config.thread_counts() if device.type == "cpu" else (1,)


def _measure(workload: Workload, config: AdamConfig) -> tuple[list[Row], list[str]]:
    """The rows of one workload, and which optimizers cannot be had. Keeps nothing of its memory."""
    beside = limits(workload)  # first, while there is room
    candidates = build(workload, config.reference)
    calls = candidates.calls | beside
    rows: list[Row] = []
    before = torch.get_num_threads()
    for threads in _thread_counts(config, workload.device):
        torch.set_num_threads(threads)
        say(
            f"{workload.name} {workload.kind}: {len(calls)} candidates, {config.repeats} rounds, "
            f"{threads} thread{'s' * (threads > 1)}"
        )
        labels = {
            "workload": workload.name,
            "dtype": workload.kind,
            "parameters": workload.parameters,
            "tensors": len(workload.shapes),
            "threads": threads,
        }
        times, errors = interleaved(calls, config.repeats, workload.device)
        rows += summarize(times, workload.moved, labels)
        for name, error in (candidates.errors | errors).items():
            rows.append({**labels, "name": name, "error": f"{workload.name} {workload.kind}, {name}: {error}"})
    torch.set_num_threads(before)
    return rows, candidates.missing


def interleaved(
    calls: dict[str, Call], repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every call in each of so many rounds, after a warm-up; and what ran out of memory, and how.

    Each round has an order of its own: what a call leaves in the caches favours some successors over others, by up
    to a tenth. What runs out of memory is left out from then on.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    finish = finisher(device.type)
    finish()
    sizes = dict.fromkeys(calls, 1)  # of the blocks of calls
    shuffled = random.Random(0)
    for turn in range(-WARM_UP, repeats):
        for name in shuffled.sample([*times], len(times)):
            try:
                seconds = mean_seconds(calls[name], sizes[name], finish)
            except torch.cuda.OutOfMemoryError as error:
                errors[name] = first_line(error)
                del times[name]
                continue
            if device.type == "cuda":
                sizes[name] = max(1, min(MOST_CALLS, round(BLOCK_SECONDS / seconds)))
            if turn >= 0:
                times[name].append(seconds)
    return times, errors


def _notes(workloads: list[Workload], config: AdamConfig, device: torch.device) -> list[str]:
    by_name = {workload.name: workload for workload in workloads}
    sizes = (f"{name} {w.parameters:,} in {len(w.shapes)}" for name, w in by_name.items())
    by_kind = {workload.kind: workload for workload in workloads}
    needed = (f"{kind} {w.moved // w.parameters}" for kind, w in by_kind.items())
    threads = ", ".join(map(str, _thread_counts(config, device)))
    notes = [
        f"on {device}; threads used: {threads}; parameters in tensors: {'; '.join(sizes)}",
        "GB/s: what a step must move, whatever it moves besides, over its time; bytes a parameter: "
        f"{', '.join(needed)} (parameter, gradient and moments are read, all but the gradient written)",
        "copy: torch.Tensor.copy_ that reads and writes as many bytes in all, in the same rounds; in "
        "place: torch.Tensor.mul_, as many (most CPUs fetch what a copy overwrites too: it is no upper limit)",
        f"medians and quartiles of {config.repeats} rounds, each in another order, after {WARM_UP} rounds that "
        f"do not count; ratios of times (below 1: faster), the last one of bandwidths",
    ]
    if any(workload.master for workload in workloads):
        notes.append(
            "-master: float32 master weights, read and written too; torch: gradients are copied to float32, the "
            "masters updated, and copied back into the parameters"
        )
    if device.type == "cuda":
        notes.append(
            f"a round is a block of calls that takes about {BLOCK_SECONDS * 1e3:g} ms, or of one, from its first "
            "launch until the device is finished; peers share parameters and gradients"
        )
    return notes
