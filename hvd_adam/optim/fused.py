"""The fused Adam update: compiles the expression of expression.py, verifies the kernel and runs it.

CPUs: PyTorch compiles the expression to C++ with OpenMP. GPUs: the same update is written in Triton
(triton_kernel.py). Every kernel is compared with the expression before it is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hvd_adam.optim.expression import (
    Buffers,
    Kernel,
    KernelSpec,
    Scalars,
    scalars,
    update_arguments,
    update_tensors,
    update_uncompiled,
)
from hvd_adam.optim.inductor_kernel import compile_without_guards
from hvd_adam.optim.kernel_cache import clear_cache, host_cache

# Large enough that the compiler divides the loop among threads.
_EXAMPLE_ELEMENTS = 1 << 20


class KernelCompileError(RuntimeError):
    """The update cannot be compiled on this machine; the message is one line."""


def update(spec: KernelSpec, buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int) -> None:
    """Takes one step of Adam over whole buffers, in place.

    Args:
        spec: fits the buffers.
        buffers: on one device.
        grad_scale: multiplies the gradient; 0-dimensional; None for 1. A NaN on the buffers' GPU makes the update
            change nothing.
        scalars: the numbers of the step.
        seed: of stochastic rounding, in [0, 2³¹).

    Raises:
        KernelCompileError: the spec cannot be compiled here; nothing has been changed.
    """
    _kernel(spec)(buffers, grad_scale, scalars, seed)


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
        disk_cache: whether what it compiles is kept in `kernel_cache`. (Triton has a cache of its own.)
        for_every_size: whether implementation="auto" uses the kernel for small models, too: on a GPU the number of
            launches matters more than the number of elements.
        skips_nan: whether a NaN grad_scale on the buffers' device makes the kernel change nothing.
        example_elements: length of the longer of the two examples that a kernel is verified with.
    """

    compile: Callable[[KernelSpec], Kernel]
    disk_cache: bool = False
    for_every_size: bool = False
    skips_nan: bool = False
    example_elements: int = _EXAMPLE_ELEMENTS


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
            return _load_or_compile(spec) if backend(spec.device).disk_cache else _compile_verified(spec)
        except Exception as error:
            _compile_errors[spec] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise KernelCompileError(_compile_errors[spec])


def _load_or_compile(spec: KernelSpec) -> Kernel:
    """Loads the kernel from this host's cache, or compiles it into the cache."""
    try:
        with host_cache(spec.name):
            return _compile_verified(spec)
    except Exception:
        # A damaged cache is the one cause that can be removed: empty it and compile once more.
        clear_cache()
        return _compile_verified(spec)


def _compile_verified(spec: KernelSpec) -> Kernel:
    """Compiles a kernel and compares its results on two examples with those of the expression, uncompiled."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_by = backend(spec.device)
        kernel = made_by.compile(spec)
        for elements in (made_by.example_elements, 1001):
            compiled, expected = _example(spec, elements), _example(spec, elements)
            kernel(*compiled)
            update_uncompiled(spec, *expected)
            for ours, theirs in zip(vars(compiled[0]).values(), vars(expected[0]).values(), strict=True):
                if ours is not None and not torch.allclose(ours, theirs, rtol=2**-6, atol=1e-6):
                    raise RuntimeError("the compiled kernel does not compute what its source does")
    return kernel


def _compile_with_triton(spec: KernelSpec) -> Kernel:
    from hvd_adam.optim import triton_kernel  # here: PyTorch has Triton only where it is built for GPUs

    def kernel(buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int) -> None:
        triton_kernel.update(spec.rounding, spec.decay, buffers, grad_scale, scalars, seed)

    return kernel


def _compile_with_inductor(spec: KernelSpec) -> Kernel:
    def one_pass(*arguments: Any) -> None:
        update_tensors(spec, *arguments)

    # PyTorch limits the compilations of one code object: each spec gets its own.
    one_pass.__code__ = one_pass.__code__.replace(co_name=spec.name)
    compiled = compile_without_guards(one_pass, update_arguments(spec, *_example(spec, _EXAMPLE_ELEMENTS)))

    def kernel(buffers: Buffers, grad_scale: Tensor | None, scalars: Scalars, seed: int) -> None:
        compiled(*update_arguments(spec, buffers, grad_scale, scalars, seed))

    return kernel


def _refuse(spec: KernelSpec) -> Kernel:
    raise RuntimeError(f"there is no fused kernel for devices of type {spec.device!r}")


_NO_BACKEND = Backend(_refuse)
_BACKENDS = {
    "cpu": Backend(_compile_with_inductor, disk_cache=True),
    "cuda": Backend(_compile_with_triton, for_every_size=True, skips_nan=True),
}


def _example(spec: KernelSpec, n: int) -> tuple[Buffers, None, Scalars, int]:
    """Returns arguments of a kernel with buffers of n elements; identical on each call."""
    wave = torch.linspace(-3, 3, n, device=spec.device)
    zeros = [torch.zeros(n, dtype=spec.moment_dtype, device=spec.device) for _ in range(3)]
    buffers = Buffers(
        param=wave.to(spec.dtype),
        grad=wave.cos().to(spec.dtype),
        exp_avg=zeros[0],
        exp_avg_sq=zeros[1],
        max_exp_avg_sq=zeros[2] if spec.amsgrad else None,
        master_param=wave.clone() if spec.rounding == "master" else None,
    )
    hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": False}
    return buffers, None, scalars(hyper, 1), 7
