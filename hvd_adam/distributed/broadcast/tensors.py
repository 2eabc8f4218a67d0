"""Broadcasts of tensors, and of containers that hold tensors, bit for bit.

Tensors are sent as bytes, so that types and values that Horovod does not support (bfloat16, NaN payloads, complex
buffers) arrive unchanged.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvd_adam.distributed.collectives.groups import RankGroup, all_ranks
from hvd_adam.distributed.context import horovod
from hvd_adam.optim.memory import increment_versions

ROOT = 0
CHUNK_BYTES = 64 * 2**20  # smaller tensors are packed into chunks of this size


@torch.inference_mode(False)  # Horovod's thread is not in that mode, and could not write what is created in it
@torch.no_grad()
def broadcast_tensors(
    tensors: Iterable[torch.Tensor], name: str, root: int = ROOT, group: RankGroup | None = None
) -> None:
    """Overwrites the tensors with those of one rank. Every rank calls it.

    Args:
        tensors: of any dtype, memory format and device; shapes and dtypes identical on all ranks.
        name: prefix of the names of the collectives, identical on all ranks.
        root: the rank, among all ranks of the job.
        group: the ranks that take part; all by default.
    """
    process_set = (group or all_ranks()).process_set
    for number, chunk in enumerate(_chunks(map(distinct, tensors))):
        in_place = len(chunk) == 1 and _is_plain(chunk[0])  # a large tensor needs no other memory
        packed = _to_bytes(chunk[0]) if in_place else torch.cat([_to_bytes(tensor) for tensor in chunk])
        for part, piece in enumerate(torch.split(packed, CHUNK_BYTES)):  # MPI counts elements in 31 bits
            place = f"{name}.{number}.{part}"
            horovod().broadcast_(piece, root_rank=root, name=place, process_set=process_set)
        if in_place:
            increment_versions(chunk)
        if in_place or horovod().rank() == root:
            continue
        sizes = [tensor.numel() * tensor.element_size() for tensor in chunk]
        for tensor, received in zip(chunk, torch.split(packed, sizes), strict=True):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(_from_bytes(received, tensor))


def distinct(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a view of a tensor with one of the elements that `expand` has repeated, or the tensor itself."""
    repeated = [stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
    return tensor[tuple(0 if r else slice(None) for r in repeated)] if any(repeated) else tensor


@dataclass(frozen=True)
class _Place:
    """Stands for a tensor in nested containers."""

    number: int
    shape: torch.Size
    dtype: torch.dtype


def broadcast_nested(value: Any, name: str, root: int = ROOT) -> Any:
    """Returns one rank's nested dictionaries, lists and tuples. Every rank calls it.

    Tensors are sent in chunks, so that beside the result a rank needs memory for few chunks only; Horovod's
    `broadcast_object` needs a multiple of the object. All else is pickled.

    Args:
        value: on that rank, with tensors on the CPU. Ignored on others.
        name: prefix of the names of the collectives, identical on all ranks.
        root: the rank.
    """
    tensors: list[torch.Tensor] = []
    skeleton = _without_tensors(value, tensors) if horovod().rank() == root else None
    places: list[_Place]
    skeleton, places = horovod().broadcast_object(
        (skeleton, [_Place(i, t.shape, t.dtype) for i, t in enumerate(tensors)]), root, name=f"{name}.skeleton"
    )
    if horovod().rank() != root:
        tensors = [torch.empty(place.shape, dtype=place.dtype, device="cpu") for place in places]
    broadcast_tensors(tensors, name, root)
    return value if horovod().rank() == root else _with_tensors(skeleton, tensors)


def with_versions(original: Mapping[Any, Any], items: dict[Any, Any]) -> dict[Any, Any]:
    """Returns items as a state dictionary of a model if the original is one, else the items.

    `Module.load_state_dict` reads the versions of the modules from its attribute `_metadata`: modules whose format
    has changed convert, or refuse, what has none.
    """
    versions = getattr(original, "_metadata", None)
    if versions is None:
        return items
    state = OrderedDict(items)
    state._metadata = versions  # type: ignore[attr-defined]
    return state


def _without_tensors(value: Any, found: list[torch.Tensor]) -> Any:
    """Returns nested containers with places instead of tensors, which are added to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return _Place(len(found) - 1, value.shape, value.dtype)
    if isinstance(value, dict) and not isinstance(value, Counter):
        return with_versions(value, {key: _without_tensors(item, found) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(item, found) for item in value)
    return value


def _with_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Returns nested containers with tensors in their places."""
    if isinstance(value, _Place):
        return tensors[value.number]
    if isinstance(value, dict) and not isinstance(value, Counter):
        return with_versions(value, {key: _with_tensors(item, tensors) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(item, tensors) for item in value)
    return value


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups consecutive tensors of one device into chunks of at most CHUNK_BYTES, or of one larger tensor."""
    chunk: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if chunk and (filled + size > CHUNK_BYTES or tensor.device != chunk[0].device):
            yield chunk
            chunk, filled = [], 0
        if size:
            chunk.append(tensor)
            filled += size
    if chunk:
        yield chunk


def _is_plain(tensor: torch.Tensor) -> bool:
    """Returns whether the bytes at the tensor's address are its elements in order, for any thread to write."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg() or tensor.is_inference())


def _to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    elements = tensor.detach().resolve_conj().resolve_neg()
    return elements.contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(received: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # A slice of the packed chunk need not be aligned for a wider type: the clone is.
    return received.clone().view(like.dtype).view(like.shape)
