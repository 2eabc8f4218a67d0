"""Memory of large tensors: zeros in huge pages, which are freed with the last view; what malloc keeps."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvd_adam import Adam
from hvd_adam.optim import memory
from hvd_adam.optim.memory import Arena, zeros


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


needs_huge_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not THP.exists() or "[never]" in THP.read_text(),
    reason="this system has no huge pages",
)


@needs_huge_pages
def test_large_buffers_use_huge_pages():
    before = kilobytes("AnonHugePages")
    made = zeros(16 << 20, torch.float32, torch.device("cpu")).fill_(1)
    assert made.data_ptr() % (2 << 20) == 0
    assert kilobytes("AnonHugePages") - before > 32 << 10


def test_tensors_of_an_arena_are_aligned_have_storages_of_their_size_and_do_not_overlap():
    sizes = [1, 0, 1000, 3, 700_000, 5]
    arena = Arena(sum(sizes) * 4 + len(sizes) * Arena.GAP)
    too_large = 9_000_000
    made = [arena.zeros(size, torch.float32, torch.device("cpu")) for size in (*sizes, too_large)]
    for number, tensor in enumerate(made, start=1):
        assert not tensor.any()
        tensor.fill_(number)
    for number, tensor in enumerate(made, start=1):
        assert (tensor == number).all()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        assert tensor.data_ptr() % 64 == 0
    transposed = torch.ones(500, 3000).t()
    assert Arena(6_000_064).zeros_like(transposed, torch.float32).stride() == transposed.stride()


@needs_huge_pages
@pytest.mark.parametrize("loaded", [False, True])
def test_state_of_many_small_tensors_uses_huge_pages(loaded):
    params = [torch.nn.Parameter(torch.ones(100_000)) for _ in range(80)]
    for p in params:
        p.grad = torch.ones_like(p)
    state = Adam(params).state_dict()
    before = kilobytes("AnonHugePages")
    optimizer = Adam(params, implementation="fused")
    if loaded:
        optimizer.load_state_dict(state)
    optimizer.step()
    assert kilobytes("AnonHugePages") - before > 50_000  # of 64 MB


def test_every_tensor_counts_as_held_where_pytorch_does_not_tell(monkeypatch):
    free = [torch.zeros(3)]
    monkeypatch.setattr(memory, "_TELLS_USE_COUNT", False)
    assert memory.any_is_held(free) and not memory.any_is_held([])


FAULTS = """
import resource, torch
from hvd_adam import init
init("cpu")
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(8)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this system's C library is not glibc")
@pytest.mark.parametrize("setting", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_freed_tensors_are_used_again_without_page_faults_unless_the_user_sets_malloc(setting):
    if setting and THP.exists() and "[always]" in THP.read_text():
        pytest.skip("all memory is in huge pages, of which 32 MiB have 16")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environ |= {setting: "65536"} if setting else {}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environ, capture_output=True, text=True, check=True)
    faults, pages = int(done.stdout), 8 * (4 << 20) // mmap.PAGESIZE
    assert (faults > pages / 2) == (setting is not None), faults
