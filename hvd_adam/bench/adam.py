"""`bench adam`: one optimizer step without communication, compared with a copy of as many bytes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from hvd_adam.bench.config import AdamConfig
from hvd_adam.bench.optimizers import Call, build, copies, first_line, release
from hvd_adam.bench.report import TIMES, Column, Result, bars
from hvd_adam.bench.stats import Row, add_ratio, ratio, timing
from hvd_adam.bench.timer import mean_seconds, synchronizer
from hvd_adam.bench.workloads import Workload, shapes
from hvd_adam.errors import UserError
from hvd_adam.log import logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARM_UP_ROUNDS = 3

# On a GPU a candidate's turn is a block of calls with one synchronization at its end, long enough to make the cost
# of the synchronization and of the first launch small. If the host launches a step more slowly than the device
# runs it, the result is the launch time.
BLOCK_SECONDS = 0.01
MIN_CALLS, MAX_CALLS = 5, 1000

COLUMNS = (
    Column("workload", "workload"),
    Column("dtype", "dtype"),
    Column("threads", "threads", "d"),
    Column("optimizer", "name"),
    *TIMES,
    Column("state", "state_bytes", ".2f"),
    Column("moved", "moved_bytes", ".2f"),
    Column("GB/s", "gb_per_s", ".1f"),
    Column("/ torch fused", "to_torch_fused", ".2f"),
    Column("/ torch foreach", "to_torch_foreach", ".2f"),
    Column("/ ours float32", "to_float32", ".2f"),
    Column("bandwidth / copy's", "to_copy", ".2f"),
    Column("/ in place's", "to_in_place", ".2f"),
)


def measure(config: AdamConfig) -> Result:
    """Times every available optimizer, interleaved, for each workload, dtype and number of threads.

    Raises:
        UserError: --device cuda without a GPU.
    """
    device = _device(config.device)
    _gradients(config, device)
    names, dtypes = config.workload_names(device.type), config.dtype_names(device.type)
    workloads = [Workload(name, dtype, shapes(config, name), device) for name in names for dtype in dtypes]
    rows: list[Row] = []
    missing: list[str] = []
    for workload in workloads:
        measured, unavailable = _measure(workload, config)
        rows += measured
        missing += unavailable
        release(device)
    panels: dict[str, list[Row]] = {}
    for row in rows:
        threads = f"\n{row['threads']} thread{'s' * (row['threads'] > 1)}" if device.type == "cpu" else ""
        panels.setdefault(f"{row['workload']}, {row['dtype']}{threads}", []).append(row)

    def draw(figure: Figure) -> None:
        bars(figure, panels, "name")

    return Result(rows, COLUMNS, [*_notes(workloads, config, device), *dict.fromkeys(missing)], draw)


def summarize(
    times: dict[str, list[float]], moved: int, labels: Row, state_bytes: Mapping[str, int] | None = None
) -> list[Row]:
    """Returns one row per candidate.

    Args:
        times: seconds by candidate; "copy" is the limit.
        moved: bytes that a step with float32 state must read and write in total, and that the copies move.
        labels: values that all rows share.
        state_bytes: of the state, which a step reads and writes, by candidate; if missing, it moves `moved`.
    """
    held, count = state_bytes or {}, labels.get("parameters", 0)
    rows = [{**labels, "name": name, **timing(seconds)} for name, seconds in times.items()]
    by_name = {row["name"]: row for row in rows}
    add_ratio(rows, "to_torch_fused", by_name.get("torch fused"))
    add_ratio(rows, "to_torch_foreach", by_name.get("torch foreach"))
    add_ratio(rows, "to_float32", by_name.get("hvd_adam fused"))
    for row in rows:
        own = moved
        if row["name"] in held:
            own = 2 * held[row["name"]] + labels["tensor_bytes"]
            row["state_bytes"] = held[row["name"]] / count
        if count:
            row["moved_bytes"] = own / count
        row["gb_per_s"] = own / row["median_ms"] / 1e6
        for limit in ("copy", "in_place"):
            seconds = by_name.get(limit.replace("_", " "), {}).get("median_ms")
            row[f"to_{limit}"] = None if seconds is None else ratio(seconds * own / moved, row["median_ms"])
    return rows


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _gradients(config: AdamConfig, device: torch.device) -> str:
    """Returns "new" or "kept"."""
    if config.gradients == "auto":
        return "new" if device.type == "cpu" else "kept"
    if config.gradients == "new" and device.type != "cpu":
        raise UserError("--gradients new: on a GPU several steps are timed together; use --gradients kept")
    return config.gradients


def _thread_counts(config: AdamConfig, device: torch.device) -> tuple[int, ...]:
    return config.thread_counts() if device.type == "cpu" else (1,)


def _measure(workload: Workload, config: AdamConfig) -> tuple[list[Row], list[str]]:
    """Returns the rows of one workload, and one line on each optimizer that is not available."""
    copy_calls = copies(workload)  # first, while there is memory for them
    candidates = build(workload, config.reference)
    calls = candidates.calls | copy_calls
    rows: list[Row] = []
    before = torch.get_num_threads()
    for threads in _thread_counts(config, workload.device):
        torch.set_num_threads(threads)
        logger.info(
            f"{workload.name} {workload.dtype_name}: {len(calls)} candidates, {config.repeats} rounds, "
            f"{threads} thread{'s' * (threads > 1)}"
        )
        labels = {
            "workload": workload.name,
            "dtype": workload.dtype_name,
            "parameters": workload.parameters,
            "tensors": len(workload.shapes),
            "tensor_bytes": 3 * workload.parameters * workload.dtype.itemsize,  # two of a parameter, its gradient
            "threads": threads,
        }
        renew = candidates.renew if _gradients(config, workload.device) == "new" else {}
        times, errors = interleaved(calls, config.repeats, workload.device, renew)
        rows += summarize(times, workload.moved, labels, candidates.state_bytes)
        for name, error in (candidates.errors | errors).items():
            rows.append(
                {**labels, "name": name, "error": f"{workload.name} {workload.dtype_name}, {name}: {error}"}
            )
    torch.set_num_threads(before)
    return rows, candidates.missing


def interleaved(
    calls: dict[str, Call], repeats: int, device: torch.device, before: Mapping[str, Call] | None = None
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times all calls in every round, after `WARM_UP_ROUNDS` untimed rounds.

    Each round has a different random order, because the contents of the caches after one call make some successors
    up to a tenth faster than others. A call that runs out of memory is dropped.

    Args:
        calls: by name.
        repeats: timed rounds.
        device: of the calls.
        before: functions to run before each turn of a call, untimed, by its name.

    Returns:
        Seconds per round by name, and the errors of the dropped calls by name.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    synchronize = synchronizer(device.type)
    synchronize()
    sizes = dict.fromkeys(calls, 1)  # calls per block
    shuffled = random.Random(0)
    for turn in range(-WARM_UP_ROUNDS, repeats):
        for name in shuffled.sample([*times], len(times)):
            try:
                if before and name in before:
                    before[name]()
                seconds = mean_seconds(calls[name], sizes[name], synchronize)
            except torch.cuda.OutOfMemoryError as error:
                errors[name] = first_line(error)
                del times[name]
                continue
            if device.type == "cuda":
                sizes[name] = max(MIN_CALLS, min(MAX_CALLS, round(BLOCK_SECONDS / seconds)))
            if turn >= 0:
                times[name].append(seconds)
    return times, errors


def _notes(workloads: list[Workload], config: AdamConfig, device: torch.device) -> list[str]:
    by_name = {workload.name: workload for workload in workloads}
    sizes = (f"{name} {w.parameters:,} in {len(w.shapes)} tensors" for name, w in by_name.items())
    by_dtype = {workload.dtype_name: workload for workload in workloads}
    needed = (f"{dtype} {w.moved // w.parameters}" for dtype, w in by_dtype.items())
    threads = ", ".join(map(str, _thread_counts(config, device)))
    notes = [
        f"device {device}; threads: {threads}; parameters: {'; '.join(sizes)}; gradients: "
        f"{_gradients(config, device)}",
        "GB/s: the bytes that a step must move, over its time, whatever else it moves; bytes per parameter: "
        f"{', '.join(needed)} (parameter, gradient and moments are read, all but the gradient are written)",
        "state, moved: bytes a parameter of the state, and that a step reads and writes with it; the bandwidths "
        "of the last columns are of these bytes",
        "copy: torch.Tensor.copy_ that reads and writes as many bytes in total, in the same rounds; in place: "
        "torch.Tensor.mul_ of as many bytes (most CPUs also fetch what a copy overwrites: copy is no upper limit)",
        f"medians and quartiles of {config.repeats} rounds, each in a different random order, after "
        f"{WARM_UP_ROUNDS} warm-up rounds; ratios of times (below 1: faster), the last one of bandwidths",
    ]
    if any(workload.master for workload in workloads):
        notes.append(
            "-master: float32 master weights, which are read and written too; torch: gradients are copied to "
            "float32, the master weights are updated and copied back into the parameters"
        )
    if device.type == "cuda":
        notes.append(
            f"a turn is a block of calls of about {BLOCK_SECONDS * 1e3:g} ms, at least {MIN_CALLS}, from the "
            "first launch until the device has completed all; peers share parameters and gradients"
        )
    return notes
