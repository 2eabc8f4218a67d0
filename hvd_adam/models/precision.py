"""Dtypes, autocast and loss scaling for each value of `--precision`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hvd_adam.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtype(precision: str) -> torch.dtype:
    """Returns the dtype of parameters and images: float64 for "fp64", else float32."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context of the forward pass: autocast for "bf16" and "fp16", else a null context."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def loss_scaler(precision: str, device: torch.device) -> Any | None:
    """Returns a `GradScaler` for "fp16", whose gradients would underflow, and None for other precisions.

    Raises:
        UserError: fp16 on the CPU with PyTorch before 2.3, which has no loss scaler for it.
    """
    if precision != "fp16":
        return None
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type)
    if device.type == "cuda":
        return torch.cuda.amp.GradScaler()
    raise UserError(f"--precision fp16 on the CPU needs torch ≥ 2.3, not {torch.__version__}: use bf16")


def make_deterministic() -> None:
    """Makes PyTorch refuse operations with results that vary from run to run; call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch requires it on GPUs
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
