"""Barrier, mean, sum and gather over the ranks: what `Cluster`'s methods of these names do.

Values travel as words of 64 bits, float64 or int64, and every rank adds those of all ranks in the order of the
ranks. So a dictionary takes one collective, integers are exact, and all ranks get the same bits. Sums of
`LARGE_WORDS` or more are added by Horovod, in its order, in up to three collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.collectives.exchange import Call, exchange
from hvd_adam.distributed.collectives.nested import Leaf, leaves, rebuild
from hvd_adam.distributed.context import horovod
from hvd_adam.errors import CollectiveError, UserError

# From this many words on, sums are reduced by Horovod, which needs no memory for the words of all ranks.
LARGE_WORDS = 1 << 16

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def barrier(cluster: Cluster) -> None:
    """Waits until every rank has called it; see `Cluster.barrier`."""
    if cluster.size > 1:
        exchange(cluster, Call("cluster.barrier()"), _words([]))


@torch.no_grad()
def total(cluster: Cluster, value: Any) -> Any:
    """Returns the sum over the ranks; see `Cluster.sum`."""
    found, call = _described(cluster, "cluster.sum()", value, _kind)
    parts = [] if call.error else [_summand(leaf) for leaf in found.values()]
    return _like(value, _sum(cluster, call, parts))


@torch.no_grad()
def mean(cluster: Cluster, value: Any, weight: float) -> Any:
    """Returns the mean over the ranks; see `Cluster.mean`."""
    found, call = _described(cluster, "cluster.mean()", value, _kind_of_mean)
    try:
        weight = _checked_weight(weight)
    except UserError as error:
        call = _failed(cluster, call, error)
    parts = [] if call.error else [_summand(leaf).double() for leaf in found.values()]
    if cluster.size == 1:
        return _like(value, [part if weight else part.fill_(math.nan) for part in parts])
    weighted = [part * weight if weight else torch.zeros_like(part) for part in parts]
    *sums, weights = _sum(cluster, call, [*weighted, _word(float(weight))])
    return _like(value, [part / weights for part in sums])


@torch.no_grad()
def gather(cluster: Cluster, value: Any, method: str = "cluster.gather()") -> list[Any]:
    """Returns the values of all ranks; see `Cluster.gather`.

    Args:
        cluster: this process.
        value: as there.
        method: name of the call in messages.
    """
    found, call = _described(cluster, method, value, _kind_to_gather)
    own = [] if call.error else [_raw(leaf) for leaf in found.values()]
    rows = exchange(cluster, call, _words(own)) if cluster.size > 1 else [_words(own)]

    def read(row: Tensor) -> Any:
        start = 0

        def take(leaf: Leaf) -> Any:
            nonlocal start
            item, start = _from_raw(row, start, leaf)
            return item

        return rebuild(value, take)

    return [read(row) for row in rows]


def _described(
    cluster: Cluster, method: str, value: Any, kind: Callable[[Leaf], str]
) -> tuple[dict[str, Leaf], Call]:
    """Returns the leaves of a value and the call with them; with an error if a leaf cannot be sent.

    On one rank the error is raised.
    """
    call = Call(method)
    try:
        found = dict(leaves(value))
        return found, Call(method, {path: kind(leaf) for path, leaf in found.items()})
    except UserError as error:
        return {}, _failed(cluster, call, error)


def _failed(cluster: Cluster, call: Call, error: UserError) -> Call:
    if cluster.size == 1:
        raise CollectiveError(f"{call.method}: {error}") from None
    return Call(call.method, {}, str(error))


def _checked_weight(weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):  # the last for tensors with several elements
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UserError(f"the weight is {weight!r}; it must be a finite number of at least 0")
    return number


def _kind(leaf: Leaf) -> str:
    if not isinstance(leaf, Tensor):
        return "an int" if isinstance(leaf, int) else "a float"
    if not (leaf.is_floating_point() or leaf.dtype in _INTEGERS):
        raise UserError(f"a tensor of dtype {leaf.dtype} cannot be added: pass integers or floating-point values")
    return f"a tensor {tuple(leaf.shape)} of {leaf.dtype}"


def _kind_of_mean(leaf: Leaf) -> str:
    return _kind(leaf) if isinstance(leaf, Tensor) else "a number"


def _kind_to_gather(leaf: Leaf) -> str:
    if not isinstance(leaf, Tensor):
        return "a bool" if isinstance(leaf, bool) else _kind(leaf)
    rest = f" with rows {tuple(leaf.shape[1:])}" if leaf.ndim else ", 0-dimensional"
    return f"a tensor{rest} of {leaf.dtype}"


def _summand(leaf: Leaf) -> Tensor:
    """Returns the elements of a leaf on the CPU, 1-dimensional float64 or int64; a copy."""
    if not isinstance(leaf, Tensor):
        return _word(leaf)
    dtype = torch.float64 if leaf.is_floating_point() else torch.int64
    return leaf.detach().to("cpu", dtype, copy=True).reshape(-1)


def _word(number: float) -> Tensor:
    dtype = torch.int64 if isinstance(number, int) else torch.float64
    return torch.tensor([number], dtype=dtype, device="cpu")


def _words(parts: Sequence[Tensor]) -> Tensor:
    """Returns tensors of 64-bit elements as one, of int64."""
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.cat([empty, *(part.view(torch.int64) for part in parts)])


@torch.inference_mode(False)  # Horovod's thread is not in that mode
def _sum(cluster: Cluster, call: Call, parts: list[Tensor]) -> list[Tensor]:
    """Returns the sums of the parts over the ranks."""
    if cluster.size == 1:
        return parts
    lengths = list(map(len, parts))
    if sum(lengths) < LARGE_WORDS:
        rows = exchange(cluster, call, _words(parts))
        of_ranks = [torch.split(row, lengths) for row in rows]
        columns = [[row[i].view(part.dtype) for row in of_ranks] for i, part in enumerate(parts)]
        if any(map(_overflows, columns)):
            raise CollectiveError(f"{call.method}: the sum of integers over the ranks needs more than 64 bits")
        return [reduce(torch.add, column) for column in columns]
    exchange(cluster, call, _words([]))
    sums = list(parts)
    for dtype in (torch.float64, torch.int64):
        places = [i for i, part in enumerate(parts) if part.dtype == dtype]
        if places:
            name = f"hvd_adam.cluster.{dtype}"
            added = horovod().allreduce(torch.cat([parts[i] for i in places]), op=horovod().Sum, name=name)
            for i, part in zip(places, torch.split(added, [lengths[i] for i in places]), strict=True):
                sums[i] = part
    return sums


def _overflows(summands: Sequence[Tensor]) -> bool:
    """Returns whether a sum of integers wraps around; the same on all ranks."""
    if summands[0].dtype != torch.int64 or not len(summands[0]):
        return False
    estimate = reduce(torch.add, (summand.double() for summand in summands)).abs()  # with an error of far less
    return any(
        not -(2**63) <= sum(int(summand[i]) for summand in summands) < 2**63
        for i in (estimate >= 2**62).nonzero().flatten().tolist()
    )


def _like(value: Any, results: list[Tensor]) -> Any:
    """Returns containers like those of a value with results in place of the leaves."""
    items = iter(results)

    def take(leaf: Any) -> Any:
        item = next(items)
        return item.reshape(leaf.shape).to(leaf.device) if isinstance(leaf, Tensor) else item.item()

    return rebuild(value, take)


def _raw(leaf: Leaf) -> Tensor:
    """Returns a leaf as 64-bit words: the bytes of a tensor after the size of its first dimension."""
    if not isinstance(leaf, Tensor):
        return _word(leaf)
    data = leaf.detach().resolve_conj().resolve_neg().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    padding = torch.zeros(-len(data) % 8, dtype=torch.uint8, device="cpu")
    return _words([_word(len(leaf) if leaf.ndim else 1), torch.cat([data, padding]).view(torch.int64)])


def _from_raw(row: Tensor, start: int, leaf: Any) -> tuple[Any, int]:
    """Returns another rank's leaf like this rank's, and the place after it."""
    if not isinstance(leaf, Tensor):
        word = row[start : start + 1]
        number = word.item() if isinstance(leaf, int) else word.view(torch.float64).item()
        return (bool(number) if isinstance(leaf, bool) else number), start + 1
    first = int(row[start])
    shape = (first, *leaf.shape[1:]) if leaf.ndim else ()
    size = math.prod(shape) * leaf.element_size()
    end = start + 1 + -(-size // 8)
    data = row[start + 1 : end].clone().view(torch.uint8)[:size]
    return data.view(leaf.dtype).reshape(shape).to(leaf.device), end
