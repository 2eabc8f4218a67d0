"""The fused Adam update: compiles the kernels, verifies them and runs them.

CPUs: C++ with OpenMP (kernels/cpu_kernel.cpp). GPUs: Triton (kernels/triton_kernel.py). Every kernel is compared
with the expression of expression.py before it is used.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec, Tensors, update_uncompiled
from hvd_adam.optim.formats.expression import update_uncompiled as update_in_blocks
from hvd_adam.optim.kernels import cpu_kernel
from hvd_adam.optim.optimizer_state import Group, Member, Part, States
from hvd_adam.optim.update_rows import (
    Batch,
    FindNonfinite,
    HyperParameters,
    Kernel,
    UpdateRows,
    hyper_parameters,
)


class KernelCompileError(RuntimeError):
    """The update cannot be compiled on this machine; the message is one line."""


def update(spec: KernelSpec, batch: Batch, groups: Sequence[HyperParameters], grad_scale: Tensor | None) -> None:
    """Takes one step of Adam over the tensors of a batch, in place, and counts it.

    Args:
        spec: of the rows that have made the batch.
        batch: what to update.
        groups: the hyper-parameters of all groups, see `hyper_parameters`.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1. A NaN on the tensors' GPU makes the update
            change nothing but the step counts.

    Raises:
        KernelCompileError: the spec cannot be compiled here; nothing has been changed.
    """
    _kernel(spec).update(batch, groups, grad_scale)


def find_nonfinite(
    spec: KernelSpec, batch: Batch, groups: Sequence[HyperParameters], mark: Tensor | None
) -> Tensor:
    """Makes a number NaN if a gradient of a batch has an element that is infinite or NaN, in one launch.

    Args:
        spec: of the rows that have made the batch, for a type of device whose `Backend` decides there.
        batch: has the gradients.
        groups: the hyper-parameters of all groups, see `hyper_parameters`.
        mark: the number: float64, 0-dimensional, on the tensors' device; None for a new 1.

    Returns:
        The number.
    """
    find = _kernel(spec).find_nonfinite
    assert find is not None
    return find(batch, groups, mark)


def compile_error(spec: KernelSpec) -> str | None:
    """Compiles the spec or loads it from the cache; returns the error in one line, or None."""
    try:
        _kernel(spec)
    except KernelCompileError as error:
        return str(error)
    return None


# Compilation.


@dataclass(frozen=True)
class Backend:
    """How the kernels of one type of device are made.

    Attributes:
        compile: returns the kernel of a spec.
        for_every_size: whether implementation="auto" uses the kernel for small models, too: on a GPU the number of
            launches matters more than the number of elements.
        skips_nan: whether a NaN grad_scale on the tensors' device makes the kernel change nothing. It then also
            tells on the device whether gradients are finite.
        example_elements: length of the longest tensor of the example that a kernel is verified with: large enough
            that threads divide it.
    """

    compile: Callable[[KernelSpec], Kernel]
    for_every_size: bool = False
    skips_nan: bool = False
    example_elements: int = 1 << 17


def register_backend(device_type: str, backend: Backend) -> None:
    """Makes all kernels for a type of device, such as "cpu", with this backend; compiled ones are dropped."""
    _BACKENDS[device_type] = backend
    _compile_errors.clear()
    _kernel.cache_clear()


def backend(device_type: str) -> Backend:
    """Returns the backend of a type of device; for one that has no kernels, a backend that refuses every spec."""
    return _BACKENDS.get(device_type, _NO_BACKEND)


_compile_errors: dict[KernelSpec, str] = {}


@cache
def _kernel(spec: KernelSpec) -> Kernel:
    if spec not in _compile_errors:
        try:
            return _compile_verified(spec)
        except Exception as error:
            _compile_errors[spec] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise KernelCompileError(_compile_errors[spec])


def _compile_verified(spec: KernelSpec) -> Kernel:
    """Compiles a kernel and compares its results on an example with those of the expression."""
    made_by = backend(spec.device)
    kernel = made_by.compile(spec)
    with torch.no_grad():
        groups, rows, ours = _example(spec, made_by.example_elements)
        _, _, expected = _example(spec, made_by.example_elements)
        kernel.update(rows.batch(), hyper_parameters(groups), None)
        for (p, state), (q, other), group in zip(ours.items(), expected.items(), groups, strict=True):
            names = state.keys() - {"step"}
            assert q.grad is not None
            expected_state = {name: other[name] for name in names}
            _update_uncompiled(spec, q.detach(), q.grad, expected_state, group)
            for mine, right in ((p, q), *((state[name], other[name]) for name in names)):
                codes = mine.dtype in (torch.int8, torch.uint8)
                rtol, atol = (0.0, 1.0) if codes else (2**-6, 1e-6)
                if not torch.allclose(mine.detach().double(), right.detach().double(), rtol=rtol, atol=atol):
                    raise RuntimeError("the compiled kernel does not compute what its source does")
        if kernel.find_nonfinite is not None:
            _verify_nonfinite(kernel.find_nonfinite, groups, rows)
    return kernel


def _verify_nonfinite(find: FindNonfinite, groups: Sequence[Group], rows: UpdateRows) -> None:
    """Has a kernel find an infinite element, and one that is NaN, and nothing in gradients that are finite."""
    for bad in (0.0, math.inf, math.nan):
        grad = rows.params[0].grad
        assert grad is not None
        grad.view(-1)[-1] = bad
        mark = torch.zeros((), dtype=torch.float64, device=grad.device)
        find(rows.batch(), hyper_parameters(groups), mark)
        if bool(mark.isnan()) != (not math.isfinite(bad)):
            raise RuntimeError("the compiled kernel does not tell whether gradients are finite")


def _update_uncompiled(spec: KernelSpec, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: Group) -> None:
    if not spec.in_blocks:
        update_uncompiled(spec, Tensors(p, grad, **state), None, group, 1, 0)
        return
    flat = {name: t.reshape(-1) for name, t in state.items()}  # of contiguous tensors: views
    update_in_blocks(spec, p.view(-1), grad.view(-1), flat, 1.0, group, 1, 0)


def _compile_with_triton(spec: KernelSpec) -> Kernel:
    from hvd_adam.optim.kernels import triton_launch  # here: PyTorch has Triton only where it is built for GPUs

    return triton_launch.kernel(spec)


def _refuse(spec: KernelSpec) -> Kernel:
    raise RuntimeError(f"there is no fused kernel for devices of type {spec.device!r}")


_NO_BACKEND = Backend(_refuse)
_BACKENDS = {
    "cpu": Backend(cpu_kernel.compile_kernel),
    "cuda": Backend(_compile_with_triton, for_every_size=True, skips_nan=True),
}


def _example(spec: KernelSpec, elements: int) -> tuple[list[Group], UpdateRows, States]:
    """Returns groups of one parameter each, of all kinds, their table and their state; identical on each call."""
    common = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False}
    masters = {"master": True, "correction": "8bit"}.get(spec.rounding, False)
    common |= {"maximize": False, "amsgrad": False, "master_weights": masters, "state_format": spec.state_format}
    common |= {"stochastic_rounding": spec.rounding == "stochastic"}
    other: Group = {"maximize": True} if spec.in_blocks else {"amsgrad": True}
    kinds: tuple[Group, ...] = ({}, other, {"weight_decay": 0.0}, {"decoupled_weight_decay": True})
    groups: list[Group] = [{**common, **kind} for kind in kinds]
    states: States = defaultdict(dict)
    members = []
    sizes = (elements, 1001, 17, 1)
    shapes = ((2, elements // 2), (3, 1501), (2, 2049), (64, 64)) if spec.in_blocks else [(n,) for n in sizes]
    for number, shape in enumerate(shapes):
        wave = torch.linspace(-3, 3, math.prod(shape), dtype=torch.float32, device=spec.device)
        p = torch.nn.Parameter(wave.to(spec.dtype).reshape(shape))
        p.grad = wave.cos().to(spec.dtype).reshape(shape)
        members.append(Member(p, number, 0, Part.of(p)))
    return groups, UpdateRows(spec, members, groups, states), states
