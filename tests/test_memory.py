"""Memory of large tensors: zeros in huge pages, which are freed with the last view."""

import mmap
from pathlib import Path

import pytest
import torch

from hvd_adam.optim.memory import zeros


def kilobytes(kind):
    """Returns this process's memory of this kind from /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("elements", [0, 1, 1000, (3 << 20) + 7])
def test_zeros_of_every_size_and_dtype_are_zero_and_writable(dtype, elements):
    made = zeros(elements, dtype, torch.device("cpu"))
    assert (made.dtype, made.shape, made.device.type) == (dtype, (elements,), "cpu")
    assert not made.any()
    assert made.untyped_storage().nbytes() == elements * dtype.itemsize
    assert made.fill_(1).sum(dtype=torch.float64) == elements


def test_memory_of_large_buffers_is_freed_with_their_last_view():
    before = kilobytes("Rss")
    view = zeros(64 << 20, torch.float32, torch.device("cpu")).fill_(1)[5:6]
    assert kilobytes("Rss") - before > 200 << 10
    assert view == 1
    del view
    assert kilobytes("Rss") - before < 100 << 10


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not THP.exists() or "[never]" in THP.read_text(),
    reason="this system has no huge pages",
)
def test_large_buffers_use_huge_pages():
    before = kilobytes("AnonHugePages")
    made = zeros(16 << 20, torch.float32, torch.device("cpu")).fill_(1)
    assert made.data_ptr() % (2 << 20) == 0
    assert kilobytes("AnonHugePages") - before > 32 << 10
