"""Launches of the kernel for GPUs: its tables on the device, and its arguments.

A step of a list of tensors that lie where they lay costs the host no copy to the device: the tables are kept, and
the hyper-parameters are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from ctypes import c_float
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec, scalars
from hvd_adam.optim.formats.expression import factors
from hvd_adam.optim.kernels import triton_blocks, triton_kernel
from hvd_adam.optim.update_rows import Batch, HyperParameters, Kernel, Rows

# Whether Triton's compiled kernels take all arguments of their source.
REPEATS_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

# Of a batch; more only where gradients have other addresses in every step.
MAX_PLANS = 8

DECAYS = ("none", "coupled", "decoupled")


class Launch(NamedTuple):
    """Tensors of one kind, which one launch updates, and what their kernel reads in every step.

    Attributes:
        rows: their indices in the batch.
        group: the group of each.
        groups: the groups, without duplicates.
        blocks: how many blocks they have.
        whole: table of the tensors, int64, on their device; its columns are the kernel's WHOLE.
        tensor_of_block: line of the table by block, int64, on their device.
        constants: the last arguments: AMSGRAD where the kernel has it, DECAY, ALIGNED, and those of the spec.
        compiled: launches of what Triton has compiled, by the form of the arguments.
    """

    rows: Rows
    group: Rows
    groups: list[int]
    blocks: int
    whole: Tensor
    tensor_of_block: Tensor
    constants: tuple[Any, ...]
    compiled: dict[object, Callable[..., object]]


class Plan(NamedTuple):
    """What the steps of a batch have in common as long as its addresses stay.

    Attributes:
        counts: the step counts in memory.
        launches: usually one.
        stream: CUDA's handle of the stream of all; 0 on a CPU.
    """

    counts: list[c_float]
    launches: list[Launch]
    stream: int

    def count_step(self) -> list[float]:
        """Adds one to the step count of every tensor and returns the results."""
        steps = [count.value + 1 for count in self.counts]
        for count, step in zip(self.counts, steps, strict=True):
            count.value = step
        return steps


def plan_for(spec: KernelSpec, batch: Batch, groups: Sequence[HyperParameters]) -> Plan:
    """Returns the plan of a batch, from an earlier step if nothing has moved."""
    device = batch.params[0].device
    decay = [0 if group.weight_decay == 0 else 1 + group.decoupled_weight_decay for group in groups]
    # Memory of the tables may be used again in the order of their stream only.
    stream = torch.cuda.current_stream(device.index).cuda_stream if device.type == "cuda" else 0
    key = batch.rows.tobytes(), *decay, stream
    if key not in batch.plans:
        if len(batch.plans) >= MAX_PLANS:
            batch.plans.clear()
        rows = batch.rows
        kinds = 3 * (rows["max_exp_avg_sq"] != 0) + np.array(decay)[rows["group"]]
        launches = [_launch(spec, rows, np.flatnonzero(kinds == k), int(k), device) for k in np.unique(kinds)]
        counts = list(map(c_float.from_address, rows["step"].tolist()))
        batch.plans[key] = Plan(counts, [launch for launch in launches if launch.blocks], stream)
    plan: Plan = batch.plans[key]
    return plan


def _launch(spec: KernelSpec, rows: Rows, chosen: Rows, kind: int, device: torch.device) -> Launch:
    rows, module = rows[chosen], module_of(spec)
    blocks = -(-rows["elements"] // module.BLOCK)
    names = module.WHOLE[:-1]
    whole = np.stack([rows[name] for name in names] + [np.cumsum(blocks) - blocks], axis=1)
    aligned = not (whole[:, : names.index("elements")] % 16).any()
    amsgrad = () if spec.in_blocks else (kind >= 3,)
    return Launch(
        rows=chosen,
        group=rows["group"],
        groups=np.unique(rows["group"]).tolist(),
        blocks=int(blocks.sum()),
        whole=_on_device(whole, device),
        tensor_of_block=_on_device(np.repeat(np.arange(len(rows)), blocks), device),
        constants=(*amsgrad, DECAYS[kind % 3], aligned, *module.constants(spec).values()),
        compiled={},
    )


def arguments(
    spec: KernelSpec,
    launch: Launch,
    groups: Sequence[HyperParameters],
    grad_scale: Tensor | None,
    steps: Sequence[float],
) -> tuple[Any, ...]:
    """Returns the arguments of the kernel.

    Args:
        spec: of the batch.
        launch: which of its tensors to update.
        groups: the hyper-parameters of all groups.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1. A NaN on the tensors' device makes the
            update change nothing.
        steps: number of the step that each tensor of the batch takes.
    """
    device = launch.whole.device
    device_scale, host_scale = grad_scale, 1.0
    if grad_scale is not None and grad_scale.device != device:
        device_scale, host_scale = None, float(grad_scale)

    def line(group: HyperParameters, step: float) -> tuple[float, ...]:
        numbers = scalars(group._asdict(), step)
        if spec.in_blocks:
            decay, last = numbers.weight_decay, (numbers.step_size, numbers.eps, step)
            return host_scale * group.sign, decay, *factors(spec, group._asdict(), 1.0), *last
        return host_scale * group.sign, *numbers, step

    if len(launch.groups) == 1 and steps.count(steps[0]) == len(steps) and spec.dtype != torch.float64:
        # Arguments cost no copy to the device. Triton makes float32 of them.
        table, alone = None, line(groups[launch.groups[0]], steps[0])
    else:
        alone = (0.0,) * len(module_of(spec).REAL)
        # Most tensors have the group and the step of others.
        own = np.stack([launch.group, np.array(steps)[launch.rows]])
        pairs, which = np.unique(own, axis=1, return_inverse=True)
        lines = np.array([line(groups[int(group)], step) for group, step in pairs.T.tolist()])
        dtype = np.float64 if spec.dtype == torch.float64 else np.float32
        table = _on_device(lines.astype(dtype)[which.reshape(-1)], device)
    return launch.whole, launch.tensor_of_block, table, device_scale, *alone, *launch.constants


def _on_device(table: np.ndarray[Any, np.dtype[Any]], device: torch.device) -> Tensor:
    """Copies a table to the device without waiting for it."""
    host = torch.from_numpy(table)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def module_of(spec: KernelSpec) -> Any:
    """Returns the module of the kernel of a spec."""
    return triton_blocks if spec.in_blocks else triton_kernel


def _run(spec: KernelSpec, launch: Launch, stream: int, given: tuple[Any, ...]) -> None:
    """Launches the kernel; a repeated launch does not ask Triton again which kernel fits its arguments."""
    _, _, table, scale, *_ = given
    # All that Triton's choice depends on, beyond what is the same for a launch: memory of tables is aligned.
    form = table is None, None if scale is None else (scale.dtype, scale.data_ptr() % 16)
    if form in launch.compiled:
        launch.compiled[form](*given, stream=stream)
        return
    adam = triton_blocks.adam_in_blocks if spec.in_blocks else triton_kernel.adam
    compiled = adam[launch.blocks,](*given, num_warps=module_of(spec).WARPS)
    if REPEATS_DIRECTLY and compiled is not None:  # None: interpreted
        launch.compiled[form] = compiled[launch.blocks, 1, 1]


def kernel(spec: KernelSpec) -> Kernel:
    """Returns the kernel of a spec; it does not synchronize host and device."""

    def run(batch: Batch, groups: Sequence[HyperParameters], grad_scale: Tensor | None) -> None:
        device = batch.params[0].device
        # Triton launches on the current device, which may be another than the tensors'.
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else nullcontext():
            plan = plan_for(spec, batch, groups)
            steps = plan.count_step()
            for launch in plan.launches:
                _run(spec, launch, plan.stream, arguments(spec, launch, groups, grad_scale, steps))

    return run
