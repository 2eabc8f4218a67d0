"""The functions of codec.py, compiled where this machine can: C++ for CPUs, Triton for GPUs.

Kernels are compared with codec.py, bit by bit, before they are used. So ranks need not agree on an implementation:
one that has no compiler computes what the others compute.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.wire import codec as plain
from hvd_adam.distributed.wire import cpu_codec
from hvd_adam.distributed.wire.codec import SMALLEST, Codec, Own


class Functions(NamedTuple):
    """An implementation of codec.py, with its arguments.

    Attributes:
        encode: as `codec.encode`.
        add_and_encode: as `codec.add_and_encode`.
        decode: as `codec.decode`.
    """

    encode: Callable[[Codec, Tensor, Tensor, Tensor, Tensor, float, float], None]
    add_and_encode: Callable[[Codec, Tensor, Own | None, Tensor, Tensor, Tensor, float], None]
    decode: Callable[[Codec, Tensor, Tensor], None]


PLAIN = Functions(plain.encode, plain.add_and_encode, plain.decode)


@cache
def functions(codec: Codec, device_type: str) -> Functions:
    """Returns the fastest implementation for a format and a type of device, such as "cpu".

    The first call compiles, or loads the kernels from this host's cache, and verifies them. Where there is no
    compiler it warns, and returns `PLAIN`.
    """
    try:
        fused = _compiled(device_type)
        _verify(fused, codec, device_type)
        return fused
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        message = (
            f"gradients are encoded without compiled kernels, which is slower: {type(error).__name__}: {reason}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return PLAIN


def _compiled(device_type: str) -> Functions:
    if device_type == "cpu":
        return Functions(cpu_codec.encode, cpu_codec.add_and_encode, cpu_codec.decode)
    if device_type == "cuda":
        # Here: PyTorch has Triton only where it is built for GPUs.
        from hvd_adam.distributed.wire import triton_codec

        return Functions(triton_codec.encode, triton_codec.add_and_encode, triton_codec.decode)
    raise RuntimeError(f"there are no kernels for devices of type {device_type!r}")


def _verify(fused: Functions, codec: Codec, device_type: str) -> None:
    """Compares results on an example with those of codec.py.

    Raises:
        RuntimeError: they differ.
    """
    for ours, right in zip(_example(fused, codec, device_type), _example(PLAIN, codec, device_type), strict=True):
        if not ((ours == right) | (ours.isnan() & right.isnan())).all():
            raise RuntimeError("the compiled kernels do not compute what their source does")


def _example(by: Functions, codec: Codec, device_type: str) -> list[Tensor]:
    """Returns all results on gradients of every kind.

    Threads divide them, and the last block is not complete.
    """
    parts, part = 2, 160 * codec.block
    m = parts * part
    places = torch.arange(m, dtype=torch.float32, device=device_type)
    gradients = torch.sin(places * places) * 2.0 ** (places % 37 - 18)
    gradients[2 * codec.block : 4 * codec.block] = 0.0
    gradients[4 * codec.block : 5 * codec.block] *= SMALLEST
    gradients[-codec.block] = torch.nan
    gradients = gradients[: -codec.block // 3]
    residual = torch.cos(places) / 8
    residual[3 * codec.block : 5 * codec.block] = 0.0

    payload = torch.empty(parts, codec.payload_bytes(part), dtype=torch.uint8, device=device_type)
    by.encode(codec, gradients, residual, residual, payload, 1 / 3, 1024.0)
    totals, server = torch.empty_like(payload), places[:part].sin() / 8
    for own, total in zip((None, Own(gradients[part:], 1, 1 / 3)), totals, strict=True):
        by.add_and_encode(codec, payload, own, server, server, total, 1024.0)
    decoded = torch.empty_like(gradients)
    by.decode(codec, payload, decoded)
    return [residual, payload, server, totals, decoded]
