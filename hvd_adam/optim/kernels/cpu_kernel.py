"""The fused update for CPUs: compiles cpu_kernel.cpp with the system's C++ compiler, and calls it."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.kernels.kernel_cache import cached
from hvd_adam.optim.update_rows import Batch, HyperParameters, Kernel

_SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
}
# No option changes results: each operation is rounded by itself, infinities and NaN keep their meaning.
_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off")
_OPTIONS_FOR_SPEED = ("-fno-math-errno", "-fno-trapping-math")  # square roots and selections in vector registers


def compile_kernel(spec: KernelSpec) -> Kernel:
    """Compiles the kernel of a spec, or loads it from this host's cache.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the result cannot be loaded.
    """
    command = [*_compiler(), *_OPTIONS, *_OPTIONS_FOR_SPEED, *_definitions(spec)]
    source = _SOURCE.read_text()

    def build(target: Path) -> None:
        done = subprocess.run(
            [*command, "-x", "c++", "-", "-o", str(target)], input=source, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the C++ compiler failed: {' '.join(command[:1])}: {done.stderr.strip()[-300:]}")

    library = ctypes.CDLL(str(cached(spec.name, f"{command}\n{source}", build)))
    function = library.hvd_adam_update
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int)
    function.restype = None

    def kernel(batch: Batch, groups: Sequence[HyperParameters], grad_scale: Tensor | None) -> None:
        # As `Group` in cpu_kernel.cpp.
        numbers = np.array([(lr, *betas, *others) for lr, betas, *others in groups], np.float64)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        rows = batch.rows
        function(rows.ctypes.data, len(rows), numbers.ctypes.data, scale, torch.get_num_threads())

    return kernel


def _definitions(spec: KernelSpec) -> list[str]:
    if spec.dtype not in _TYPES or spec.moment_dtype not in _TYPES:
        raise RuntimeError(f"there is no fused kernel for parameters of {spec.dtype}")
    types = {"PARAM": _TYPES[spec.dtype], "MOMENT": _TYPES[spec.moment_dtype], "ROUNDING": spec.rounding.upper()}
    return [f"-D{name}={value}" for name, value in types.items()]


def _compiler() -> list[str]:
    """Returns the command of the C++ compiler: $CXX, or the first that is installed."""
    chosen = os.environ.get("CXX")
    candidates = [chosen.split()] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if command and shutil.which(command[0]):
            return command
    names = ", ".join(command[0] for command in candidates if command)
    raise RuntimeError(f"no C++ compiler found ({names}): install g++, or set CXX")
