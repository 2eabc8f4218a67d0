"""Tensors of all ranks that only rank 0 needs, or has: neither takes more memory on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod


def rows_to_root(own: Tensor, name: str) -> Tensor | None:
    """Returns [ranks, n] on rank 0, and None on the others. Every rank calls it.

    Args:
        own: [n], of the same length on all ranks, on any device.
        name: of the collective.
    """
    hvd = horovod()
    own = own.detach().cpu().contiguous()
    if hvd.size() == 1:
        return own.clone().unsqueeze(0)
    splits = torch.zeros(hvd.size(), dtype=torch.int32, device="cpu")
    splits[0] = len(own)
    received, _ = hvd.alltoall(own, splits, name=name)
    return received.view(hvd.size(), -1) if hvd.rank() == 0 else None


def row_of_root(rows: Tensor | None, name: str) -> Tensor:
    """Returns this rank's row, 1-dimensional. Every rank calls it.

    Args:
        rows: [ranks, …], float32, on the CPU, on rank 0; None on the others.
        name: of the collective.
    """
    hvd = horovod()
    own = torch.empty(0, dtype=torch.float32, device="cpu") if rows is None else rows.reshape(-1).contiguous()
    if hvd.size() == 1:
        return own
    each = len(own) // hvd.size()
    splits = torch.full((hvd.size(),), each, dtype=torch.int32, device="cpu")
    received: Tensor = hvd.alltoall(own, splits, name=name)[0]
    return received
