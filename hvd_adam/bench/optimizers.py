"""The candidates of `bench adam`: a step of every available optimizer, and copies to compare them with."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from hvd_adam.bench.workloads import Workload
from hvd_adam.optim.adam import Adam

Call = Callable[[], object]

# The reference computes in float64, one operation at a time: above this size it is timed only on request.
REFERENCE_PARAMETERS = 1_000_000

# Above this size on a GPU, only the fast implementations are timed: others are many times slower and need memory.
GPU_SMALL_PARAMETERS = 32_000_000

# Up to this size a GPU of 80 GB has memory for all candidates with state in few bits as well.
GPU_FORMAT_PARAMETERS = 1_000_000_000

# Size of each of the two buffers of a copy: larger than all caches.
COPY_BYTES = 1 << 30


class Tensors:
    """The parameters of a workload and their gradients.

    Attributes:
        parameters: with the workload's shapes, dtype and device; normal random numbers, as are their gradients.
    """

    def __init__(self, workload: Workload) -> None:
        self.device = workload.device
        generator = torch.Generator(self.device).manual_seed(0)
        options: dict[str, Any] = {"device": self.device, "dtype": workload.dtype, "generator": generator}
        self.parameters: list[torch.nn.Parameter] = []
        for shape in workload.shapes:
            parameter = torch.nn.Parameter(torch.randn(shape, **options))
            parameter.grad = torch.randn(shape, **options)
            self.parameters.append(parameter)

    @cached_property
    def masters(self) -> list[torch.nn.Parameter]:
        """float32 copies of the parameters, with zero gradients."""
        masters = [torch.nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        for master in masters:
            master.grad = torch.zeros_like(master)
        return masters

    def renew_gradients(self) -> None:
        """Replaces every gradient by a copy, as `zero_grad()` and a backward pass do."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clone()


Factory = Callable[[Tensors], Call]


@dataclass
class Candidates:
    """The optimizers of a workload.

    Attributes:
        calls: functions that make a step, by name of the optimizer.
        renew: functions that replace the gradients of its next step, by name of the optimizer; not if shared.
        state_bytes: bytes of the state by name of the optimizer, masters included, where it is known.
        missing: one line on each optimizer that is not available.
        errors: first line of the error by name, of optimizers for which the memory did not suffice.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    renew: dict[str, Call] = field(default_factory=dict)
    state_bytes: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


def build(workload: Workload, reference: bool) -> Candidates:
    """Builds every optimizer for a workload, and makes its first step.

    On a CPU each optimizer has parameters of its own, because a large cache would favour those that share them. On
    a GPU hvd_adam has its own and the peers share theirs: with 1.3 G parameters, the memory of two peers and of
    hvd_adam exceeds 80 GB. Sharing favours none there, because each is called many times in succession.

    Args:
        workload: the parameters to update.
        reference: whether to time the slow reference at any size.
    """
    found = Candidates()
    shared: Tensors | None = None
    for name, make in factories(workload, reference).items():
        try:
            if workload.device.type == "cpu" or name.startswith("hvd_adam"):
                tensors = Tensors(workload)
                found.calls[name] = _started(make, tensors)
                if held := _state_bytes(found.calls[name]):
                    found.state_bytes[name] = held
                if workload.device.type == "cpu":
                    found.renew[name] = tensors.renew_gradients
            else:
                shared = shared or Tensors(workload)
                found.calls[name] = _started(make, shared)
        except ImportError:
            found.missing.append(f"{name}: not installed")
        except torch.cuda.OutOfMemoryError as error:
            found.errors[name] = first_line(error)
        except Exception as error:  # a peer that is installed but does not work here
            found.missing.append(f"{name}: {first_line(error)}")
        if name in found.errors:
            release(workload.device)  # what it had allocated
    return found


def release(device: torch.device) -> None:
    """Frees unused GPU memory; optimizers are reference cycles, so they need the garbage collector."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return (str(error) or repr(error)).splitlines()[0]


def copies(workload: Workload) -> dict[str, Call]:
    """Returns functions that move as many bytes as a step: half of them read and half written.

    "copy" writes to another buffer, "in place" to the buffer that it reads. More than `COPY_BYTES` are moved by
    using buffers of that size several times.
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


def _state_bytes(step: Call) -> int:
    """Returns the bytes of the tensors in the state of the optimizer whose method a step is; 0 if it is none."""
    optimizer = getattr(step, "__self__", None)
    states = optimizer.state.values() if isinstance(optimizer, torch.optim.Optimizer) else ()
    return sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.dim())


def _started(make: Factory, tensors: Tensors) -> Call:
    step = make(tensors)
    step()
    return step


def factories(workload: Workload, reference: bool) -> dict[str, Factory]:
    """Returns by name the functions that build an optimizer for tensors and return its step.

    Args:
        workload: the parameters to update.
        reference: as in `build`.
    """
    on_cpu = workload.device.type == "cpu"
    small = on_cpu or workload.parameters <= GPU_SMALL_PARAMETERS
    formats = on_cpu or workload.parameters <= GPU_FORMAT_PARAMETERS
    reference = reference or workload.parameters <= REFERENCE_PARAMETERS
    found = {
        "hvd_adam foreach": _ours("foreach", workload) if small else None,
        "hvd_adam fused": _ours("fused", workload),
        "hvd_adam fused bfloat16": _ours("fused", workload, state_format="bfloat16") if formats else None,
        "hvd_adam fused 8bit": _ours("fused", workload, state_format="8bit") if formats else None,
        "hvd_adam reference": _ours("reference", workload) if reference else None,
        "torch for-loop": _torch(workload, foreach=False, fused=False) if small else None,
        "torch foreach": _torch(workload, foreach=True),
        "torch fused": _torch(workload, fused=True),
        "apex FusedAdam": _apex(workload),
        "deepspeed CPUAdam": _deepspeed(workload) if on_cpu else None,
        "bitsandbytes 8bit": _eight_bit("bitsandbytes.optim", "Adam8bit", workload) if small else None,
        "torchao 8bit": _eight_bit("torchao.optim", "Adam8bit", workload) if small else None,
    }
    if workload.master and formats:  # 8-bit corrections in place of float32 masters
        eight_bits = {"state_format": "8bit", "master_weights": "8bit"}
        found["hvd_adam fused 8bit + 8bit"] = _ours("fused", workload, **eight_bits)
    return {name: make for name, make in found.items() if make is not None}


def _ours(implementation: str, workload: Workload, **formats: Any) -> Factory:
    options: dict[str, Any] = {"implementation": implementation, "master_weights": workload.master, **formats}
    return lambda tensors: Adam(tensors.parameters, **options).step


def _torch(workload: Workload, **options: Any) -> Factory:
    if not workload.master:
        return lambda tensors: torch.optim.Adam(tensors.parameters, **options).step

    def make(tensors: Tensors) -> Call:
        """PyTorch's Adam has no master weights; this is the usual recipe for them."""
        masters, parameters = tensors.masters, tensors.parameters
        optimizer = torch.optim.Adam(masters, **options)
        master_gradients = [p.grad for p in masters if p.grad is not None]

        @torch.no_grad()
        def step() -> None:
            torch._foreach_copy_(master_gradients, [p.grad for p in parameters if p.grad is not None])
            optimizer.step()
            torch._foreach_copy_(tuple(parameters), tuple(masters))

        return step

    return make


def _eight_bit(module: str, name: str, workload: Workload) -> Factory:
    def make(tensors: Tensors) -> Call:
        kind = getattr(import_module(module), name)  # optional: large packages

        if workload.master:
            raise ValueError("has no master weights")
        step: Call = kind(tensors.parameters).step
        return step

    return make


def _apex(workload: Workload) -> Factory:
    # It supports master weights only with capturable=True, for CUDA graphs.
    options = {"master_weights": True, "capturable": True} if workload.master else {}

    def make(tensors: Tensors) -> Call:
        FusedAdam = import_module("apex.optimizers").FusedAdam  # optional: built by hand against CUDA
        step: Call = FusedAdam(tensors.parameters, adam_w_mode=False, **options).step
        return step

    return make


def _deepspeed(workload: Workload) -> Factory:
    def make(tensors: Tensors) -> Call:
        DeepSpeedCPUAdam = import_module("deepspeed.ops.adam").DeepSpeedCPUAdam  # optional: a large package

        if workload.master:
            raise ValueError("has no master weights")
        step: Call = DeepSpeedCPUAdam(tensors.parameters, adamw_mode=False).step
        return step

    return make
