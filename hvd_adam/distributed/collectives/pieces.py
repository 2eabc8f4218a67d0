"""Collectives on CPUs in pieces, none of which needs a message above `MESSAGE_BYTES`; see there.

Each starts the collective of every piece, and returns a function that waits for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import MESSAGE_BYTES, horovod


def start_allreduce(values: Tensor, name: str) -> Callable[[], None]:
    """Starts to add a 1-dimensional tensor over the ranks, in place.

    Args:
        values: float16, float32 or float64; neither read nor changed until the returned function has returned.
        name: name of the collective, identical on all ranks and unique among those in flight.
    """
    hvd = horovod()
    # Two ranks send halves of a piece. Groups of one: Horovod does not fuse them with others, nor copy them.
    handles = [
        hvd.grouped_allreduce_async_([piece], op=hvd.Sum, name=part)
        for piece, part in _pieces(values, name, 2 * MESSAGE_BYTES)
    ]

    def wait() -> None:
        _results(handles, name)

    return wait


def start_reducescatter(rows: Tensor, name: str) -> Callable[[], Tensor]:
    """Starts to add the rows of all ranks, of which this rank gets its own.

    Args:
        rows: [ranks, n]; contiguous.
        name: as in `start_allreduce`.

    Returns:
        Waits for the sum of this rank's row, [n].
    """
    hvd = horovod()
    if rows.device.type != "cpu":
        handle = hvd.reducescatter_async(rows.view(-1), op=hvd.Sum, name=name)
        return lambda: _joined(_results([handle], name))
    # Horovod's Gloo has a reduce-scatter after which the next large broadcast hangs, and that of Open MPI asks
    # before it sends.
    received = start_alltoall(rows, name)

    def wait() -> Tensor:
        summands = received()
        total = summands[0]
        for row in summands[1:]:  # in rank order
            total += row
        return total

    return wait


def start_alltoall(rows: Tensor, name: str) -> Callable[[], Tensor]:
    """Starts to send the r-th row to rank r.

    Args:
        rows: [ranks, n]; contiguous.
        name: as in `start_allreduce`.

    Returns:
        Waits for the rows that the ranks have sent to this one, [ranks, n].
    """
    hvd, ranks = horovod(), len(rows)
    handles = [hvd.alltoall_async(piece.reshape(-1), name=part) for piece, part in _pieces(rows, name)]
    return lambda: _joined([received.view(ranks, -1) for received, _ in _results(handles, name)])


def start_allgather(values: Tensor, name: str) -> Callable[[], Tensor]:
    """Starts to send a 1-dimensional tensor to all ranks.

    Args:
        values: [n], the same length on all ranks.
        name: as in `start_allreduce`.

    Returns:
        Waits for the tensors of all ranks, [ranks, n].
    """
    hvd, ranks = horovod(), horovod().size()
    handles = [hvd.allgather_async(piece, name=part) for piece, part in _pieces(values, name)]
    return lambda: _joined([received.view(ranks, -1) for received in _results(handles, name)])


def _pieces(values: Tensor, name: str, nbytes: int = MESSAGE_BYTES) -> list[tuple[Tensor, str]]:
    """Returns pieces of the last dimension, each with its name; the first has the name of the whole."""
    length = nbytes // values.element_size() if values.device.type == "cpu" else values.shape[-1]
    pieces = torch.split(values, max(1, length), dim=-1)
    return [(piece, f"{name}.{number}" if number else name) for number, piece in enumerate(pieces)]


def _results(handles: list[int], name: str) -> list[Any]:
    """Waits for collectives; a report of a stalled job shows `name`."""
    return list(map(horovod().synchronize, handles))


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
