"""The fused update for CPUs: compiles cpu_kernel.cpp, or block_kernel.cpp, and calls it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.kernels.cpp_compiler import compile_library
from hvd_adam.optim.update_rows import Batch, HyperParameters, Kernel

_FOLDER = Path(__file__).parent
_PLAIN = [_FOLDER / name for name in ("numbers.h", "rows.h", "cpu_kernel.cpp")]
_IN_BLOCKS = [_FOLDER / name for name in ("numbers.h", "rows.h", "block.h", "eight_bit.h", "block_kernel.cpp")]
_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
}
_STATES = {"float32": "FLOAT32", "bfloat16": "BFLOAT16", "8bit": "EIGHT_BIT"}


def compile_kernel(spec: KernelSpec) -> Kernel:
    """Compiles the kernel of a spec, or loads it from this host's cache.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the result cannot be loaded.
    """
    library = compile_library(spec.name, _IN_BLOCKS if spec.in_blocks else _PLAIN, _definitions(spec))
    function = library.hvd_adam_update
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_double, ctypes.c_int)
    function.restype = None

    def update(batch: Batch, groups: Sequence[HyperParameters], grad_scale: Tensor | None) -> None:
        # As `Group` in rows.h.
        numbers = np.array([(lr, *betas, *others) for lr, betas, *others in groups], np.float64)
        scale = 1.0 if grad_scale is None else float(grad_scale)
        rows = batch.rows
        function(rows.ctypes.data, len(rows), numbers.ctypes.data, scale, torch.get_num_threads())

    return Kernel(update)


def _definitions(spec: KernelSpec) -> dict[str, str]:
    if spec.dtype not in _TYPES or spec.moment_dtype not in _TYPES:
        raise RuntimeError(f"there is no fused kernel for parameters of {spec.dtype}")
    types = {"PARAM": _TYPES[spec.dtype], "MOMENT": _TYPES[spec.moment_dtype]}
    return {**types, "ROUNDING": spec.rounding.upper(), "STATE": _STATES[spec.state_format]}
