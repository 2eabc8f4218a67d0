"""Memory for large tensors: pages, tensors inside a buffer, version counters.

Buffers and an optimizer's state are in pages of 2 MiB, where the system grants them. With pages of 4 KiB the
processor translates an address for every thousand floats. On a virtual machine (each translation walks two page
tables) the fused update of 11 M parameters took 7.4 ms with small pages and 6.5 ms with huge ones. Most systems
grant them only on request (`/sys/kernel/mm/transparent_hugepage/enabled`: madvise).
"""

from __future__ import annotations

import mmap
import operator
import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

ORDINARY = (Tensor, torch.nn.Parameter)
_PAGE = 2 << 20

_dtype = operator.attrgetter("dtype")


class Arena:
    """Memory for zeros of many tensors side by side: in huge pages on a CPU, if the system has them.

    Each tensor has a storage of its own size, so what is saved or copied of it is no more. The memory is requested
    with the first one, becomes resident where it is written to, and is freed with the last one.

    Args:
        nbytes: size of all tensors together, and at most `GAP` more for each. Less than one page: torch.zeros is
            used, as for tensors that do not fit.
    """

    GAP = 64  # a cache line, to which every tensor is aligned

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes if nbytes >= _PAGE and hasattr(mmap, "MADV_HUGEPAGE") else 0
        self._memory: mmap.mmap | None = None
        self._used = 0

    def zeros(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a 1-dimensional tensor of zeros, as `torch.zeros` does."""
        nbytes = elements * dtype.itemsize
        if device.type != "cpu" or nbytes == 0 or self._used + nbytes > self._nbytes:
            return torch.zeros(elements, dtype=dtype, device=device)
        if self._memory is None:
            self._memory, self._start = _huge_pages(self._nbytes)
        place = self._start + self._used
        self._used += nbytes + -nbytes % self.GAP
        return torch.frombuffer(self._memory, dtype=dtype, count=elements, offset=place)

    def zeros_like(self, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns zeros with the shape, the device and, if it is dense, the strides of `p`."""
        if p.device.type != "cpu" or not self._nbytes:
            return torch.zeros_like(p, dtype=dtype)
        strides = torch.empty_like(p, device="meta").stride()
        return self.zeros(p.numel(), dtype, p.device).as_strided(p.shape, strides)


def _huge_pages(nbytes: int) -> tuple[mmap.mmap, int]:
    """Returns a mapping of zeros that holds at least `nbytes`, and where its first huge page begins."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # the default is a shared mapping, which has no such pages
    memory = mmap.mmap(-1, nbytes + _PAGE, flags=flags)  # freed with the last tensor that uses it
    with suppress(OSError):  # a Linux kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _PAGE


def zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns zeros as `torch.zeros` does; in huge pages on a CPU, if the system has them and one would be full.

    Args:
        elements: number of elements of the 1-dimensional tensor.
        dtype: its dtype.
        device: its device.
    """
    return Arena(elements * dtype.itemsize).zeros(elements, dtype, device)


@cache
def is_ordinary_type(kind: type) -> bool:
    """Returns whether tensors of a type keep their elements at their address.

    Those of PyTorch's types do, and parameters of types derived from them that redefine no operation.
    """
    if kind in ORDINARY or not issubclass(kind, torch.nn.Parameter):
        return kind in ORDINARY
    own = kind.__torch_function__, kind.__torch_dispatch__
    return own == (torch.nn.Parameter.__torch_function__, torch.nn.Parameter.__torch_dispatch__)


def is_ordinary(t: Tensor) -> bool:
    """Returns whether the elements are those at the tensor's address, each at its own."""
    if not is_ordinary_type(type(t)) or t.device.type not in ("cpu", "cuda"):
        return False
    return t.layout == torch.strided and not t.is_neg() and not overlaps_itself(t)


def overlaps_itself(t: Tensor) -> bool:
    """Returns whether elements of a strided tensor share memory, as after `expand`."""
    extent = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def is_trained(p: Tensor) -> bool:
    """Returns whether an update may change a parameter: it is not frozen, or has a gradient from before."""
    return p.requires_grad or p.grad is not None


def is_dense(t: Tensor) -> bool:
    """Returns whether the elements lie in memory without gaps, in any order of dimensions."""
    return t.stride() == torch.empty_like(t, device="meta").stride()


def shape_in_memory(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Returns all that the places of elements depend on, but the addresses, for strided tensors."""
    return (
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.numel, tensors)),
        set(map(_dtype, tensors)),
        set(map(Tensor.get_device, tensors)),
    )


def same_objects(known: Sequence[object], found: Collection[object]) -> bool:
    """Returns whether two collections have the very same objects in the same order."""
    return len(known) == len(found) and all(map(operator.is_, known, found))


def overlapping(params: Iterable[Tensor]) -> set[Tensor]:
    """Returns the parameters that share memory with another."""
    shared: set[Tensor] = set()
    reach, owner = 0, None
    strided = (p for p in params if p.numel() and p.layout == torch.strided and is_ordinary_type(type(p)))
    for p in sorted(strided, key=Tensor.data_ptr):
        if owner is not None and p.data_ptr() < reach:
            shared |= {owner, p}
        extent = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)) + 1
        if p.data_ptr() + extent * p.element_size() > reach:
            reach, owner = p.data_ptr() + extent * p.element_size(), p
    return shared


def memory_order(t: Tensor, skip: int, count: int) -> Tensor:
    """Returns elements [skip, skip + count) of a dense tensor in the order of memory, as a 1-dimensional view."""
    return t.as_strided((count,), (1,), t.storage_offset() + skip)


def in_same_order(t: Tensor, strides: Sequence[int]) -> bool:
    """Returns whether a tensor's elements lie in memory as those of one with its shape and these strides do."""
    return all(own == other for own, other, size in zip(t.stride(), strides, t.shape, strict=True) if size > 1)


def placed_like(p: Tensor, t: Tensor) -> Tensor:
    """Returns `t`, or a copy of it on the device and, if it is dense, with the strides of `p`."""
    same = type(t) in ORDINARY and t.device == p.device and not t.is_neg()
    if same and in_same_order(p, t.stride()):
        return t
    return torch.empty_like(p).copy_(t)


def in_place(view: Tensor) -> Tensor:
    """Returns a tensor at the same place in memory with a storage of its own.

    `torch.save` and `copy.deepcopy` copy whole storages: of a view of a buffer they would copy all of it. The
    tensor also counts its in-place changes by itself, which tells whose gradient was changed.
    """
    return torch.from_dlpack(view) if view.numel() else view  # type: ignore[attr-defined]


def any_is_held(tensors: list[Tensor], *, are_gradients: bool = False, aliases: int = 0) -> bool:
    """Returns whether anything but this list and one other holds one of the tensors, a view of it, or its memory.

    PyTorch 2.1 does not tell what graphs and DLPack hold: there the answer is always yes, so nothing that is held
    is overwritten, and memory is allocated more often.

    Args:
        tensors: the tensors.
        are_gradients: whether each is the gradient of a parameter, which holds it, too.
        aliases: number of other tensors with the memory of each that may hold it.
    """
    if not _TELLS_USE_COUNT:
        return bool(tensors)
    objects, implementations, memory = _known_references(are_gradients)
    known = objects, implementations, memory + aliases
    return any(max(counts, default=0) > count for counts, count in zip(_references(tensors), known, strict=True))


def _references(tensors: list[Tensor]) -> tuple[Iterable[int], ...]:
    """Returns the numbers of references to the objects, to what graphs and DLPack hold, and to the memory."""
    objects, implementations = map(sys.getrefcount, tensors), map(operator.methodcaller("_use_count"), tensors)
    return objects, implementations, (_storage_use_count(t.untyped_storage()._cdata) for t in tensors if t.numel())


@cache
def _known_references(are_gradients: bool) -> tuple[int, ...]:
    """Returns the references to a tensor that nothing else holds, which depend on the version of PyTorch."""
    p = torch.nn.Parameter(torch.zeros(1, device="cpu"))
    p.grad = torch.zeros_like(p) if are_gradients else None
    listed = [p.grad if are_gradients else torch.zeros(1, device="cpu")]
    return tuple(map(max, _references(list(listed))))  # type: ignore[arg-type]  # none is None


_TELLS_USE_COUNT = hasattr(Tensor, "_use_count")
_storage_use_count = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)  # absent in some versions


def copy_scaled(places: list[Tensor], gradients: list[Tensor], scale: float) -> None:
    """Copies gradients times `scale`, in one pass over memory on a CPU."""
    if scale == 1.0 or places[0].is_cuda:
        torch._foreach_copy_(places, gradients)
        if scale != 1.0:
            torch._foreach_mul_(places, scale)
        return
    for place, gradient in zip(places, gradients, strict=True):
        torch.mul(gradient, scale, out=place)


def increment_versions(params: list[Tensor]) -> None:
    """Increments autograd's version counters of parameters."""
    if not hasattr(torch.autograd.graph, "increment_version"):
        for p in params:
            p.detach().as_strided((0,), (1,)).zero_()
        return
    try:
        torch.autograd.graph.increment_version(params)
    except (TypeError, RuntimeError):  # an older PyTorch takes one tensor per call
        for p in params:
            torch.autograd.graph.increment_version(p)
