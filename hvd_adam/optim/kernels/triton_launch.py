"""Launches of the kernels for GPUs: their tables on the device, and their arguments.

A step costs the host at most one small copy to the device, of the gradients' addresses, which differ from step to
step: the other tables are kept, and the hyper-parameters are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_float
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import driver

from hvd_adam.optim.expression import KernelSpec, scalars
from hvd_adam.optim.formats.expression import factors
from hvd_adam.optim.kernels import triton_blocks, triton_kernel
from hvd_adam.optim.kernels.triton_nonfinite import mark_nonfinite
from hvd_adam.optim.update_rows import ADDRESSES, Batch, HyperParameters, Kernel, Rows

# Whether Triton's compiled kernels take all arguments of their source.
REPEATS_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)

# Of a batch; more only where other parameters have gradients in every step.
MAX_PLANS = 8

# Numbers for `find_nonfinite` that one launch makes.
MANY_ONES = 256

DECAYS = ("none", "coupled", "decoupled")


@dataclass
class Launch:
    """Tensors of one kind, which one launch updates, and what their kernels read in every step.

    Attributes:
        rows: their indices in the batch.
        group: the group of each.
        groups: the groups, without duplicates.
        blocks: how many blocks they have.
        whole: table of the tensors, int64, on their device; its columns are the kernel's WHOLE.
        tensor_of_block: line of the table by block, int64, on their device.
        amsgrad: the last arguments of the update begin with these: AMSGRAD where the kernel has it.
        decay: the next of them, DECAY.
        constants: those of the spec, which come after ALIGNED.
        aligned: whether all addresses in `whole` are multiples of 16.
        grads: the addresses of the gradients, int64, on the tensors' device.
        compiled: launches of what Triton has compiled, by kernel and the form of the arguments.
    """

    rows: Rows
    group: Rows
    groups: list[int]
    blocks: int
    whole: Tensor
    tensor_of_block: Tensor
    amsgrad: tuple[bool, ...]
    decay: str
    constants: tuple[Any, ...]
    aligned: bool
    grads: Tensor
    compiled: dict[object, Callable[..., object]] = field(default_factory=dict)
    _sent: bytes = b""
    _grads_aligned: bool = False

    def send_gradients(self, batch: Batch) -> bool:
        """Copies the addresses of the gradients to the device, unless they are there; does not wait for it.

        Returns:
            Whether all tensors are aligned to 16 bytes.
        """
        addresses = batch.rows["grad"][self.rows]
        if (found := addresses.tobytes()) != self._sent:
            self.grads.copy_(_staged(addresses, self.grads.device), non_blocking=True)
            self._sent, self._grads_aligned = found, not (addresses & 15).any()
        return self.aligned and self._grads_aligned


class Plan(NamedTuple):
    """What the steps of a batch have in common as long as its parameters and their state stay where they are.

    Attributes:
        counts: the step counts in memory.
        launches: usually one.
        device: of all tensors.
        stream: CUDA's handle of the stream of all; 0 on a CPU.
        ones: ones on the device, float64, 0-dimensional, for one use each.
    """

    counts: list[c_float]
    launches: list[Launch]
    device: torch.device
    stream: int
    ones: list[Tensor]

    def count_step(self) -> list[float]:
        """Adds one to the step count of every tensor and returns the results."""
        steps = [count.value + 1 for count in self.counts]
        for count, step in zip(self.counts, steps, strict=True):
            count.value = step
        return steps

    def one(self) -> Tensor:
        """Returns a 1 of its own, aligned to 16 bytes."""
        if not self.ones:
            self.ones.extend(torch.ones(MANY_ONES, 2, dtype=torch.float64, device=self.device)[:, 0].unbind())
        return self.ones.pop()


def plan_for(spec: KernelSpec, batch: Batch, groups: Sequence[HyperParameters]) -> Plan:
    """Returns the plan of a batch, from an earlier step if nothing but gradients has moved."""
    if batch.plan is None:
        batch.plan = _plan_of_rows(spec, batch, groups)
    plan: Plan = batch.plan
    return plan


def _plan_of_rows(spec: KernelSpec, batch: Batch, groups: Sequence[HyperParameters]) -> Plan:
    device = batch.params[0].device
    decay = [0 if group.weight_decay == 0 else 1 + group.decoupled_weight_decay for group in groups]
    # Memory of the tables may be used again in the order of their stream only. PyTorch's own function for it makes
    # an object of every stream that it returns, which takes a fifth of the time of a step over one tensor.
    stream = driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    key = batch.present, *decay, stream
    if key not in batch.plans:
        if len(batch.plans) >= MAX_PLANS:
            batch.plans.clear()
        rows = batch.rows
        kinds = 3 * (rows["max_exp_avg_sq"] != 0) + np.array(decay)[rows["group"]]
        launches = [_launch(spec, rows, np.flatnonzero(kinds == k), int(k), device) for k in np.unique(kinds)]
        counts = list(map(c_float.from_address, rows["step"].tolist()))
        launches = [launch for launch in launches if launch.blocks]
        batch.plans[key] = Plan(counts, launches, device, stream, ones=[])
    plan: Plan = batch.plans[key]
    return plan


def _launch(spec: KernelSpec, rows: Rows, chosen: Rows, kind: int, device: torch.device) -> Launch:
    rows, module = rows[chosen], module_of(spec)
    blocks = -(-rows["elements"] // module.BLOCK)
    columns = {"first_block": np.cumsum(blocks) - blocks}
    whole = np.stack([columns[name] if name in columns else rows[name] for name in module.WHOLE], axis=1)
    addresses = [number for number, name in enumerate(module.WHOLE) if name in ADDRESSES]
    return Launch(
        rows=chosen,
        group=rows["group"],
        groups=np.unique(rows["group"]).tolist(),
        blocks=int(blocks.sum()),
        whole=_on_device(whole, device),
        tensor_of_block=_on_device(np.repeat(np.arange(len(rows)), blocks), device),
        amsgrad=() if spec.in_blocks else (kind >= 3,),
        decay=DECAYS[kind % 3],
        constants=tuple(module.constants(spec).values()),
        aligned=not (whole[:, addresses] & 15).any(),
        grads=torch.empty(len(rows), dtype=torch.int64, device=device),
    )


def arguments(
    spec: KernelSpec,
    launch: Launch,
    groups: Sequence[HyperParameters],
    grad_scale: Tensor | None,
    steps: Sequence[float],
    aligned: bool,
) -> tuple[Any, ...]:
    """Returns the arguments of the update's kernel.

    Args:
        spec: of the batch.
        launch: which of its tensors to update.
        groups: the hyper-parameters of all groups.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1. A NaN on the tensors' device makes the
            update change nothing.
        steps: number of the step that each tensor of the batch takes.
        aligned: whether all tensors are aligned to 16 bytes.
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
    tables = launch.whole, launch.grads, launch.tensor_of_block, table
    return *tables, device_scale, *alone, *launch.amsgrad, launch.decay, aligned, *launch.constants


def _staged(table: Rows, device: torch.device) -> Tensor:
    """Returns a table in memory from which a copy to the device does not wait for it."""
    host = torch.from_numpy(table)
    return host.pin_memory() if device.type == "cuda" else host


def _on_device(table: Rows, device: torch.device) -> Tensor:
    """Copies a table to the device without waiting for it."""
    return _staged(table, device).to(device, non_blocking=True)


def module_of(spec: KernelSpec) -> Any:
    """Returns the module of the kernel of a spec."""
    return triton_blocks if spec.in_blocks else triton_kernel


def _run(launch: Launch, kernel: Any, warps: int, stream: int, form: object, given: tuple[Any, ...]) -> None:
    """Launches a kernel; a repeated launch does not ask Triton again which binary fits its arguments.

    Args:
        launch: keeps what has been compiled.
        kernel: Triton's.
        warps: of a block.
        stream: CUDA's handle.
        form: all that Triton's choice depends on, beyond what is the same for a launch.
        given: the arguments.
    """
    if (kernel, form) in launch.compiled:
        launch.compiled[kernel, form](*given, stream=stream)
        return
    compiled = kernel[launch.blocks,](*given, num_warps=warps)
    if REPEATS_DIRECTLY and compiled is not None:  # None: interpreted
        launch.compiled[kernel, form] = compiled[launch.blocks, 1, 1]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another than the tensors'."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def kernel(spec: KernelSpec) -> Kernel:
    """Returns the kernel of a spec; it does not synchronize host and device."""
    module = module_of(spec)
    adam = triton_blocks.adam_in_blocks if spec.in_blocks else triton_kernel.adam
    sizes = triton_kernel.TYPES[spec.dtype], len(module.WHOLE), module.BLOCK

    def update(batch: Batch, groups: Sequence[HyperParameters], grad_scale: Tensor | None) -> None:
        with _on(batch.params[0].device):
            plan = plan_for(spec, batch, groups)
            steps = plan.count_step()
            for launch in plan.launches:
                aligned = launch.send_gradients(batch)
                given = arguments(spec, launch, groups, grad_scale, steps, aligned)
                table, scale = given[3:5]
                # Memory of tables is aligned.
                form = aligned, table is None, None if scale is None else (scale.dtype, scale.data_ptr() % 16)
                _run(launch, adam, module.WARPS, plan.stream, form, given)

    def find_nonfinite(batch: Batch, groups: Sequence[HyperParameters], mark: Tensor | None) -> Tensor:
        with _on(batch.params[0].device):
            plan = plan_for(spec, batch, groups)
            mark = plan.one() if mark is None else mark
            for launch in plan.launches:
                aligned = launch.send_gradients(batch)
                given = launch.whole, launch.grads, launch.tensor_of_block, mark, aligned, *sizes
                _run(launch, mark_nonfinite, module.WARPS, plan.stream, aligned, given)
        return mark

    return Kernel(update, find_nonfinite)
