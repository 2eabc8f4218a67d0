"""Collectives on CPUs in pieces, of which those between hosts need no message above `MESSAGE_BYTES`.

Open MPI sends more over TCP only after it has asked the receiver: see `OMPI_MCA_btl_tcp_eager_limit` in `context`.

Each starts the collective of every piece, and returns a `Started` that waits for them. All ranks of the job take
part, or those of a `RankGroup`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.groups import RankGroup, all_ranks
from hvd_adam.distributed.collectives.started import Started
from hvd_adam.distributed.context import MESSAGE_BYTES, horovod
from hvd_adam.distributed.launch_env import gloo_store_address
from hvd_adam.errors import JobError

# Two ranks send halves of a piece of an all-reduce.
ALLREDUCE_BYTES = 2 * MESSAGE_BYTES
# Of two ranks of one host under Gloo. Horovod's thread waits at the end of each piece, and does not interrupt
# threads that compute (placement.batch_policy): the MLP's step takes 61 ms with these pieces, and 64 with those
# above. Two ranks add in one order however a sum is divided. With more, the order depends on the pieces, and
# released gradients, which have those above, would get other bits.
PAIR_BYTES = 64 * 2**20
# On CPUs a compressed bucket is sent in pieces: the first is on its way while the next is encoded. A piece has so
# many elements in total, and at least so many of each rank's part; a part is one message.
PIECE, LEAST_OF_PART = 1 << 20, 1 << 17
# Two hosts under Gloo swap messages from this size on.
SWAP_BYTES = 256 * 2**10


def start_allreduce(values: Tensor, name: str, group: RankGroup | None = None) -> Started[None]:
    """Starts to add a 1-dimensional tensor over the ranks, in place.

    Args:
        values: float16, float32, float64 or int64; neither read nor changed until a call of the result has
            returned.
        name: name of the collective, identical on all ranks and unique among those in flight.
        group: the ranks that take part; all by default.
    """
    hvd, group = horovod(), group or all_ranks()
    pair = group.size == 2 and not group.on_own_hosts and gloo_store_address() is not None
    # Groups of one: Horovod does not fuse them with others, nor copy them.
    handles = [
        hvd.grouped_allreduce_async_([piece], op=hvd.Sum, name=part, process_set=group.process_set)
        for piece, part in _pieces(values, name, PAIR_BYTES if pair else ALLREDUCE_BYTES)
    ]
    return Started(handles, lambda _: None, name)


def start_reducescatter(rows: Tensor, name: str) -> Started[Tensor]:
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
        return Started([handle], _joined, name)
    # Horovod's Gloo has a reduce-scatter after which the next large broadcast hangs, and that of Open MPI asks
    # before it sends.
    return start_alltoall(rows, name).then(sum_in_rank_order)


def start_alltoall(rows: Tensor, name: str, group: RankGroup | None = None) -> Started[Tensor]:
    """Starts to send the r-th row to rank r, or to the r-th rank of a group.

    Args:
        rows: [ranks, n]; contiguous.
        name: as in `start_allreduce`.
        group: as in `start_allreduce`.

    Returns:
        Waits for the rows that the ranks have sent to this one, [ranks, n].
    """
    hvd, group = horovod(), group or all_ranks()
    if _would_take_turns(rows[0], group):
        return _start_swap(rows[group.index], rows[1 - group.index], name, group)
    # contiguous: a column of one element is flattened to a view with gaps, which Horovod refuses.
    pieces = [(piece.reshape(-1).contiguous(), part) for piece, part in _pieces(rows, name)]
    handles = [hvd.alltoall_async(piece, name=part, process_set=group.process_set) for piece, part in pieces]

    def result(results: list[tuple[Tensor, Tensor]]) -> Tensor:
        return _in_rows([received for received, _ in results], rows, name)

    return Started(handles, result, name)


def start_allgather(values: Tensor, name: str, group: RankGroup | None = None) -> Started[Tensor]:
    """Starts to send a 1-dimensional tensor to all ranks.

    Args:
        values: [n], the same length on all ranks.
        name: as in `start_allreduce`.
        group: as in `start_allreduce`.

    Returns:
        Waits for the tensors of all ranks, [ranks, n].
    """
    hvd, group = horovod(), group or all_ranks()
    if _would_take_turns(values, group):
        return _start_swap(values, values, name, group)
    ranks, process_set = group.size, group.process_set
    # Open MPI's neighbour exchange, among 4 or 6 ranks, sends two of them in one message.
    nbytes = MESSAGE_BYTES if ranks == 2 else MESSAGE_BYTES // 2
    pieces = _pieces(values, name, nbytes)
    handles = [hvd.allgather_async(piece, name=part, process_set=process_set) for piece, part in pieces]
    return Started(handles, lambda results: _in_rows(results, values.expand(ranks, -1), name), name)


def columns(part: int, ranks: int, device: torch.device, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Divides the parts of a compressed bucket into pieces.

    Args:
        part: elements that each rank adds.
        ranks: their number.
        device: of the bucket.
        multiple: of elements, in all pieces but the last.

    Returns:
        (start, end) of each piece in every part.
    """
    step = max(PIECE // ranks, LEAST_OF_PART) if device.type == "cpu" else part
    step = max(step - step % multiple, multiple)
    for start in range(0, part, step):
        yield start, min(start + step, part)


def sum_in_rank_order(rows: Tensor) -> Tensor:
    """Returns the sum of rows, [ranks, n], in the order of the ranks. It takes the memory of the first."""
    total = rows[0]
    for row in rows[1:]:
        total += row
    return total


def _would_take_turns(message: Tensor, group: RankGroup) -> bool:
    """Returns whether a message of each of two hosts would be sent one after the other.

    Gloo sends data when the receiver has asked for them. Its all-to-all and all-gather send first, so the question
    for the other rank's data waits in the same connection behind their own, unless both ranks start at the same
    moment. (Gloo's alltoallv.cc, allgatherv.cc, and `Pair::sendAsyncMode` in transport/tcp/pair.cc.) With three
    ranks, the connections to the other ranks are free meanwhile; within a host, the copies of a swap cost more.
    """
    two_hosts = group.size == 2 and group.on_own_hosts and gloo_store_address() is not None
    return two_hosts and message.device.type == "cpu" and message.numel() * message.element_size() >= SWAP_BYTES


def _start_swap(kept: Tensor, sent: Tensor, name: str, group: RankGroup) -> Started[Tensor]:
    """Starts an exchange of two ranks by an all-reduce, which sends as many bytes, in both directions at once.

    The sum of two words of 64 bits, minus one of them, is the other: integers wrap around.

    Args:
        kept: [n], this rank's row of the result.
        sent: [n], the other rank's row of the result there; contiguous.
        name: as in `start_allreduce`.
        group: the two ranks.

    Returns:
        Waits for the result, [2, n].
    """
    nbytes = sent.numel() * sent.element_size()
    own = torch.zeros(-(-nbytes // 8), dtype=torch.int64, device="cpu")
    own.view(torch.uint8)[:nbytes] = sent.view(torch.uint8)
    sums = own.clone()

    def result(_: None) -> Tensor:
        other = (sums - own).view(torch.uint8)[:nbytes].view(sent.dtype)
        return torch.stack([kept, other] if group.index == 0 else [other, kept])

    return start_allreduce(sums, name, group).then(result)


def _pieces(values: Tensor, name: str, nbytes: int = MESSAGE_BYTES) -> list[tuple[Tensor, str]]:
    """Returns pieces of the last dimension, each with its name; the first has the name of the whole."""
    length = nbytes // values.element_size() if values.device.type == "cpu" else values.shape[-1]
    pieces = torch.split(values, max(1, length), dim=-1)
    return [(piece, f"{name}.{number}" if number else name) for number, piece in enumerate(pieces)]


def _in_rows(pieces: list[Tensor], expected: Tensor, name: str) -> Tensor:
    """Returns what the ranks have sent, a row of each.

    Raises:
        JobError: they have sent other numbers of elements. Horovod compares them in all-reduces only, and kernels
            that decode the result would read beyond its end.
    """
    if sum(map(Tensor.numel, pieces)) != expected.numel():
        raise JobError(
            f"the ranks have sent different numbers of elements in {name}: make the same calls with the same "
            "options on every rank"
        )
    return _joined([piece.view(len(expected), -1) for piece in pieces])


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
