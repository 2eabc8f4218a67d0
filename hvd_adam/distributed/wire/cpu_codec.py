"""The functions of codec.py for CPUs: compiles codec_kernel.cpp and calls it.

Their arguments are those of codec.py. They raise `RuntimeError` where there is no C++ compiler or it fails, and
`OSError` if the result cannot be loaded.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hvd_adam.distributed.wire.codec import GROUP, SCALE_BYTES, SENT, SMALLEST, Codec, Own
from hvd_adam.optim.kernels.cpp_compiler import compile_library

_SOURCE = Path(__file__).with_name("codec_kernel.cpp")

# As in the source: pointers, sizes, factors, number of threads.
_P, _N, _F, _T = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "hvd_adam_encode": (_P, _N, _P, _P, _P, _N, _N, _F, _F, _T),
    "hvd_adam_add_and_encode": (_P, _N, _N, _P, _N, _N, _F, _P, _P, _P, _F, _T),
    "hvd_adam_decode": (_P, _N, _N, _P, _N, _T),
}


def encode(
    codec: Codec,
    gradients: Tensor,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    scale: float,
    unit: float,
) -> None:
    """As `codec.encode`."""
    wide = gradients.float()
    _library(codec).hvd_adam_encode(
        *(wide.data_ptr(), len(wide), residual.data_ptr(), new_residual.data_ptr()),
        *(payload.data_ptr(), len(payload), codec.blocks(payload), scale, unit, torch.get_num_threads()),
    )


def add_and_encode(
    codec: Codec,
    payloads: Tensor,
    own: Own | None,
    residual: Tensor,
    new_residual: Tensor,
    payload: Tensor,
    unit: float,
) -> None:
    """As `codec.add_and_encode`."""
    wide = residual[:0] if own is None else own.gradients.float()
    rank, scale = (-1, 0.0) if own is None else (own.rank, own.scale)
    _library(codec).hvd_adam_add_and_encode(
        *(payloads.data_ptr(), len(payloads), codec.blocks(payload)),
        *(wide.data_ptr(), len(wide), rank, scale),
        *(residual.data_ptr(), new_residual.data_ptr(), payload.data_ptr(), unit, torch.get_num_threads()),
    )


def decode(codec: Codec, payloads: Tensor, out: Tensor) -> None:
    """As `codec.decode`."""
    wide = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _library(codec).hvd_adam_decode(
        *(payloads.data_ptr(), len(payloads), codec.blocks(payloads)),
        *(wide.data_ptr(), len(wide), torch.get_num_threads()),
    )
    if wide is not out:
        out.copy_(wide)


@cache
def _library(codec: Codec) -> ctypes.CDLL:
    definitions = {
        "BITS": codec.bits,
        "BLOCK": codec.block,
        "LEVELS": codec.levels,
        "ROTATED": int(codec.rotated),
        "GROUP": GROUP,
        "SCALE_BYTES": SCALE_BYTES,
        "WITHHELD": f"{(1 - SENT).hex()}f",
        "SMALLEST": f"{SMALLEST.hex()}f",
    }
    library = compile_library(f"codec-{codec.bits}", _SOURCE, definitions)
    for name, types in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library
