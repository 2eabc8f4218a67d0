"""The arithmetic of the model, by the names of `--precision`."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hvd_adam.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def parameter_dtype(precision: str) -> torch.dtype:
    """What parameters and images are kept in: float64 for "fp64", else float32."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """The context for the forward pass: autocast to bfloat16 or float16, or nothing."""
    if precision not in _AUTOCAST:
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def loss_scaler(precision: str, device: torch.device) -> Any | None:
    """A `GradScaler` for "fp16", whose gradients would underflow; None for the others.

    Raises:
        UserError: fp16 on the CPU with a PyTorch before 2.3, which has no scaler for it.
    """
    if precision != "fp16":
        return None
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type)
    if device.type == "cuda":
        return torch.cuda.amp.GradScaler()
    raise UserError(f"--precision fp16 on the CPU needs torch ≥ 2.3, not {torch.__version__}: use bf16")


def make_deterministic() -> None:
    """Lets PyTorch refuse operations whose result may differ from run to run. Before CUDA is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what PyTorch asks for on GPUs
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
