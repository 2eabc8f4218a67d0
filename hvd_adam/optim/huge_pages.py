"""Memory in pages of 2 MiB, where the system grants them, for buffers that every step reads and writes.

With pages of 4 KiB the processor translates an address for every thousand floats. On a virtual machine (each
translation walks two page tables) the fused update of 11 M parameters took 7.4 ms with small pages and 6.5 ms with
huge ones. Most systems grant them only on request (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20


def zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros as `torch.zeros` does; in huge pages on a CPU, if the system has them and one would be full.

    Args:
        elements: number of elements of the 1-dimensional tensor.
        dtype: its dtype.
        device: its device.
    """
    if device.type != "cpu" or elements * dtype.itemsize < _PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # the default is a shared mapping, which has no such pages
    memory = mmap.mmap(
        -1, elements * dtype.itemsize + _PAGE, flags=flags
    )  # zeros; freed with the last tensor that uses it
    with suppress(OSError):  # a Linux kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE
    return torch.frombuffer(memory, dtype=dtype, count=elements, offset=start)
