"""Candidates of `bench adam`: the step of every optimizer that can be had, and copies to compare them with."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from hvd_adam.bench.workloads import Workload
from hvd_adam.optim.adam import Adam

Call = Callable[[], object]

# The reference works in float64, one operation after the other: above this it is timed only on demand.
REFERENCE_PARAMETERS = 1_000_000

# On a GPU, above this: only what anybody would take there. The others are many times slower, and need room.
GPU_SMALL_PARAMETERS = 32_000_000

# Of each of the two buffers that are copied between. It is beyond all caches; more would only take room.
COPY_BYTES = 1 << 30


class Tensors:
    """Parameters with gradients, as a workload has them.

    Attributes:
        parameters: of the workload's shapes, dtype and device, filled with normal random numbers.
    """

    def __init__(self, workload: Workload) -> None:
        self.device = workload.device
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"device": self.device, "dtype": workload.dtype, "generator": generator}
        self.parameters = []
        for shape in workload.shapes:
            parameter = torch.nn.Parameter(torch.randn(shape, **options))
            parameter.grad = torch.randn(shape, **options)
            self.parameters.append(parameter)

    @cached_property
    def masters(self) -> list[torch.nn.Parameter]:
        """float32 copies of the parameters, with room for float32 gradients."""
        masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        for master in masters:
            master.grad = torch.zeros_like(master)
        return masters


Maker = Callable[[Tensors], Call]


@dataclass
class Candidates:
    """What there is to be timed.

    Attributes:
        calls: makes a step, by name.
        missing: why others cannot be had, one line each.
        errors: names of those for which there is no memory left, and the line that says so.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


def build(workload: Workload, reference: bool) -> Candidates:
    """Makes every optimizer for a workload, and its first step.

    Each has parameters of its own; on a GPU only ours has, and the peers share theirs: two of them beside ours,
    with 1.3 G parameters, would not find room on a GPU of 80 GB. (On a CPU a large cache would favour those who
    share. On a GPU each is called so often in a row that it finds its own.)

    Args:
        workload: what they are to update.
        reference: whether to take the slow reference whatever the size.
    """
    found = Candidates()
    shared: Tensors | None = None
    for name, make in _makers(workload, reference).items():
        try:
            if workload.device.type == "cpu" or name.startswith("hvd_adam"):
                found.calls[name] = _started(make, Tensors(workload))
            else:
                shared = shared or Tensors(workload)
                found.calls[name] = _started(make, shared)
        except ImportError:
            found.missing.append(f"{name}: not installed")
        except torch.cuda.OutOfMemoryError as error:
            found.errors[name] = first_line(error)
        except Exception as error:  # of a peer that is installed but does not work here: said, not passed on
            found.missing.append(f"{name}: {first_line(error)}")
        if name in found.errors:
            release(workload.device)  # as much as it had got
    return found


def release(device: torch.device) -> None:
    """Gives a GPU's memory back that nothing uses any more; optimizers refer to themselves."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """What an error says, without its details."""
    return (str(error) or repr(error)).splitlines()[0]


def limits(workload: Workload) -> dict[str, Call]:
    """What only reads half of a step's bytes and writes the other half: elsewhere, and to where it has read.

    More than `COPY_BYTES` go through buffers of that size again and again.
    """
    dtype = torch.float32 if workload.master else workload.dtype
    repeats, rest = divmod(workload.moved // 2, COPY_BYTES)
    source = torch.ones(
        min(workload.moved // 2, COPY_BYTES) // dtype.itemsize, device=workload.device, dtype=dtype
    )
    target = torch.zeros_like(source)
    last = rest // dtype.itemsize
    parts = [*[(source, target)] * repeats, *([(source[:last], target[:last])] if last else [])]

    def copy() -> None:
        for origin, goal in parts:
            goal.copy_(origin)

    def in_place() -> None:
        for origin, _ in parts:
            origin.mul_(1.0)

    return {"copy": copy, "in place": in_place}


def _started(make: Maker, tensors: Tensors) -> Call:
    step = make(tensors)
    step()
    return step


def _makers(workload: Workload, reference: bool) -> dict[str, Maker]:
    on_cpu = workload.device.type == "cpu"
    small = on_cpu or workload.parameters <= GPU_SMALL_PARAMETERS
    reference = reference or workload.parameters <= REFERENCE_PARAMETERS
    makers = {
        "hvd_adam foreach": _ours("foreach", workload) if small else None,
        "hvd_adam fused": _ours("fused", workload),
        "hvd_adam reference": _ours("reference", workload) if reference else None,
        "torch for-loop": _torch(workload, foreach=False, fused=False) if small else None,
        "torch foreach": _torch(workload, foreach=True),
        "torch fused": _torch(workload, fused=True),
        "apex FusedAdam": _apex(workload),
        "deepspeed CPUAdam": _deepspeed(workload) if on_cpu else None,
    }
    return {name: make for name, make in makers.items() if make is not None}


def _ours(implementation: str, workload: Workload) -> Maker:
    options: dict[str, Any] = {"implementation": implementation, "master_weights": workload.master}
    return lambda tensors: Adam(tensors.parameters, **options).step


def _torch(workload: Workload, **options: bool) -> Maker:
    if not workload.master:
        return lambda tensors: torch.optim.Adam(tensors.parameters, **options).step

    def make(tensors: Tensors) -> Call:
        """PyTorch keeps no master weights: this is the usual recipe for them."""
        masters, parameters = tensors.masters, tensors.parameters
        optimizer = torch.optim.Adam(masters, **options)
        gradients, wide = [p.grad for p in parameters], [p.grad for p in masters]

        @torch.no_grad()
        def step() -> None:
            torch._foreach_copy_(wide, gradients)
            optimizer.step()
            torch._foreach_copy_(parameters, masters)

        return step

    return make


def _apex(workload: Workload) -> Maker:
    # Its master weights are for steps that a CUDA graph can capture only.
    options = {"master_weights": True, "capturable": True} if workload.master else {}

    def make(tensors: Tensors) -> Call:
        from apex.optimizers import FusedAdam  # optional: built by hand against CUDA

        return FusedAdam(tensors.parameters, adam_w_mode=False, **options).step

    return make


def _deepspeed(workload: Workload) -> Maker:
    def make(tensors: Tensors) -> Call:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # optional: a large package

        if workload.master:
            raise ValueError("keeps no master weights of its own")
        return DeepSpeedCPUAdam(tensors.parameters, adamw_mode=False).step

    return make
