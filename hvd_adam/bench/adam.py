"""`bench adam`: one optimizer step without communication, beside a copy of as many bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from hvd_adam.adam import Adam
from hvd_adam.bench.config import AdamConfig
from hvd_adam.bench.report import TIMES, Column, Result, bars, say
from hvd_adam.bench.summary import Row, add_ratio, ratio, timing
from hvd_adam.errors import UserError
from hvd_adam.torchvision_compat import import_torchvision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMPLEMENTATIONS = ("foreach", "fused")
WARM_UP = 3

# The reference works in float64, one operation after the other: above this it is timed only on demand.
REFERENCE_PARAMETERS = 1_000_000

# Between two synchronisations on a GPU, lest the cost of one be taken for the optimizer's.
GPU_CALLS = 10

# A step reads parameter, gradient and both moments, and writes all but the gradient.
ACCESSES = 7

Call = Callable[[], object]

COLUMNS = (
    Column("threads", "threads", "d"),
    Column("optimizer", "name"),
    *TIMES,
    Column("GB/s", "gb_per_s", ".1f"),
    Column("/ torch fused", "to_torch_fused", ".2f"),
    Column("/ torch foreach", "to_torch_foreach", ".2f"),
    Column("bandwidth / copy's", "to_copy", ".2f"),
)


def measure(config: AdamConfig) -> Result:
    """Times every optimizer that can be had, all in turn, for each number of threads."""
    device = _device(config.device)
    dtype = getattr(torch, config.dtype)
    shapes = _shapes(config)
    count = sum(map(torch.Size.numel, shapes))
    moved = ACCESSES * dtype.itemsize * count
    calls, notes = _optimizers(config, shapes, device, dtype)
    calls |= _limits(moved, device, dtype)
    thread_counts = config.thread_counts() if device.type == "cpu" else (1,)
    rows: list[Row] = []
    before = torch.get_num_threads()
    for threads in thread_counts:
        torch.set_num_threads(threads)
        say(f"{len(calls)} candidates, {config.repeats} rounds, {threads} thread{'s' * (threads > 1)}")
        times = _interleaved(calls, config.repeats, device)
        rows += summarize(times, threads, moved)
    torch.set_num_threads(before)
    notes = [
        f"{count:,} {config.dtype} parameters in {len(shapes)} tensors on {device}; threads used: "
        f"{', '.join(map(str, thread_counts))}; GB/s: {moved / count:.0f} bytes a parameter (4 reads, 3 writes)",
        f"copy: torch.Tensor.copy_ that reads and writes {moved / 1e6:.1f} MB in all, in the same rounds; in "
        "place: torch.Tensor.mul_, as many (most CPUs fetch what a copy overwrites too: it is no upper limit)",
        f"medians and quartiles of {config.repeats} rounds, each in another order, after {WARM_UP} rounds that "
        f"do not count; ratios of times (below 1: faster), the last one of bandwidths",
        *notes,
    ]
    panels = {f"{n} thread{'s' * (n > 1)}": [row for row in rows if row["threads"] == n] for n in thread_counts}

    def draw(figure: Figure) -> None:
        bars(figure, panels, "name")

    return Result(rows, COLUMNS, notes, draw)


def summarize(times: dict[str, list[float]], threads: int, moved: int) -> list[Row]:
    """Makes a row of each candidate's times.

    Args:
        times: seconds by candidate; that of "copy" is the limit.
        threads: how many were used.
        moved: bytes that a step reads and writes.
    """
    rows = [{"threads": threads, "name": name, **timing(seconds)} for name, seconds in times.items()]
    by_name = {row["name"]: row for row in rows}
    add_ratio(rows, "to_torch_fused", by_name.get("torch fused"))
    add_ratio(rows, "to_torch_foreach", by_name.get("torch foreach"))
    for row in rows:
        row["gb_per_s"] = moved / row["median_ms"] / 1e6
        row["to_copy"] = ratio(by_name["copy"]["median_ms"], row["median_ms"])
    return rows


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _shapes(config: AdamConfig) -> list[torch.Size]:
    sizes = config.tensor_sizes()
    if sizes is not None:
        return [torch.Size([size]) for size in sizes]
    models = import_torchvision().models
    with torch.device("meta"):
        return [parameter.shape for parameter in models.resnet18().parameters()]


def _optimizers(
    config: AdamConfig, shapes: list[torch.Size], device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Call], list[str]]:
    """The `step` of every optimizer that can be had, each with parameters of its own, and why others cannot."""
    count = sum(map(torch.Size.numel, shapes))
    ours = [*IMPLEMENTATIONS, *(["reference"] if config.reference or count <= REFERENCE_PARAMETERS else [])]
    makers: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
        f"hvd_adam {name}": lambda params, name=name: Adam(params, implementation=name) for name in ours
    }
    makers |= {
        "torch for-loop": lambda params: torch.optim.Adam(params, foreach=False, fused=False),
        "torch foreach": lambda params: torch.optim.Adam(params, foreach=True),
        "torch fused": lambda params: torch.optim.Adam(params, fused=True),
        "apex FusedAdam": _apex,
        "deepspeed CPUAdam": _deepspeed,
    }
    calls, notes = {}, []
    for name, make in makers.items():
        parameters = _parameters(shapes, device, dtype)
        try:
            step = make(parameters).step
            step()
        except ImportError:
            notes.append(f"{name}: not installed")
        except Exception as error:  # of a peer that is installed but does not work here: said, not passed on
            notes.append(f"{name}: {(str(error) or repr(error)).splitlines()[0]}")
        else:
            calls[name] = step
    return calls, notes


def _parameters(
    shapes: Iterable[torch.Size], device: torch.device, dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, **options))
        parameter.grad = torch.randn(shape, **options)
        parameters.append(parameter)
    return parameters


def _apex(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam  # optional: built by hand against CUDA

    return FusedAdam(parameters, adam_w_mode=False)


def _deepspeed(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # optional: a large package

    return DeepSpeedCPUAdam(parameters, adamw_mode=False)


def _limits(moved: int, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """What only reads half of so many bytes and writes the other half: elsewhere, and to where it has read."""
    source = torch.ones(moved // 2 // dtype.itemsize, device=device, dtype=dtype)
    target = torch.zeros_like(source)
    return {"copy": lambda: target.copy_(source), "in place": lambda: source.mul_(1.0)}


def _interleaved(calls: dict[str, Call], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in each of so many rounds, after a warm-up.

    Each round has an order of its own: what a call leaves in the caches favours some successors over others, by up
    to a tenth.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for turn in range(-WARM_UP, repeats):
        for name in shuffled.sample([*calls], len(calls)):
            seconds = _seconds(calls[name], device)
            if turn >= 0:
                times[name].append(seconds)
    return times


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(GPU_CALLS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / GPU_CALLS
