"""`Lockstep`: notices when the ranks part, from a checksum that travels with the gradients."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.same_batches import SameBatches
from hvd_adam.errors import JobError

_BITS = 32
_RANKS_PER_COUNT = 32  # counts up to 32 are exact in every dtype, also as a sum of bfloat16

LOADED = "number of calls of load_state_dict since the last broadcast"
ABORTED = "backward passes that ended with an exception"
UPDATES = "number of updates since distribute()"
STEPS = "sum of the step counts in the optimizer state"
_REMEDIES = {
    LOADED: "load the state on every rank, or call optimizer.broadcast() on every rank after loading it on rank 0",
    STEPS: "load the same state on every rank, or call optimizer.broadcast() on every rank",
    ABORTED: "leave the loop on all ranks when one of them fails",
    UPDATES: "call backward() and step() equally often on all ranks, or use `with optimizer.join():`",
}
_GROUP_REMEDY = (
    "set hyper-parameters from values that are identical on all ranks, such as the mean of a metric over the ranks"
)


class Lockstep:
    """The part of a message by which every rank tells what must be identical on all ranks.

    A message is added over the ranks together with gradients, in their dtype. It holds

    - whether this rank needs another reduction,
    - each bit of a checksum of the facts, twice: as it is and inverted. If all ranks agree on a bit, one of the
      two sums is exactly zero, whatever the dtype and the number of ranks,
    - one for each rank, which is missing from a rank that has called `hvd.join()`,
    - what `SameBatches` sends.

    Args:
        rank, size: of this process.
        same_batches: notices ranks that train on the same batches.
    """

    def __init__(self, rank: int, size: int, same_batches: SameBatches) -> None:
        self._rank, self._size, self._same_batches = rank, size, same_batches
        counts = -(-size // _RANKS_PER_COUNT)
        self.length = 1 + 2 * _BITS + counts + same_batches.length
        self._expected = [min(_RANKS_PER_COUNT, size - i * _RANKS_PER_COUNT) for i in range(counts)]

    def message(self, facts: Mapping[str, object], *, again: bool) -> Tensor:
        """Returns the message of this rank, `length` elements.

        Args:
            facts: what must be identical on all ranks, by name.
            again: whether this rank needs another reduction.
        """
        checksum = zlib.crc32(repr([*facts.items()]).encode())
        bits = [checksum >> i & 1 for i in range(_BITS)]
        present = [int(i == self._rank // _RANKS_PER_COUNT) for i in range(len(self._expected))]
        return torch.tensor(
            [again, *bits, *(1 - bit for bit in bits), *present, *self._same_batches.message()],
            dtype=torch.float32,
            device="cpu",
        )

    def check(self, received: Sequence[float], facts: Mapping[str, object]) -> bool:
        """Reads the sum of all messages; every rank gets the same one.

        Args:
            received: the sum, `length` numbers.
            facts: this rank's, for the message of the error.

        Returns:
            Whether a rank needs another reduction.

        Raises:
            JobError: on every rank, if the facts differ; names the first that does, the ranks and the values. On
                the remaining ranks, if a rank has called `hvd.join()`.
        """
        bits, inverted = received[1 : 1 + _BITS], received[1 + _BITS : 1 + 2 * _BITS]
        counts = 1 + 2 * _BITS + len(self._expected)
        present = received[1 + 2 * _BITS : counts]
        if any(count < expected - 0.5 for count, expected in zip(present, self._expected, strict=True)):
            raise JobError(
                "a rank has left its training loop by hvd.join() and is behind the others: use `with "
                "optimizer.join():` around the loop, which keeps the state of all ranks identical"
            )
        if any(a and b for a, b in zip(bits, inverted, strict=True)):
            self._raise_difference(facts)
        self._same_batches.read(received[counts:])
        return asks_again(received)

    def _raise_difference(self, facts: Mapping[str, object]) -> None:
        gathered = horovod().allgather_object(dict(facts), name="hvd_adam.lockstep")
        problem = difference(gathered, range(self._size))
        if problem is not None:
            raise JobError(problem)


def difference(gathered: Sequence[Mapping[str, object]], ranks: Sequence[int]) -> str | None:
    """Returns an error message with the first fact that differs between ranks, its values, and the remedy.

    None if all are equal.

    Args:
        gathered: the facts of each rank.
        ranks: these ranks.
    """
    for name in [*gathered[0], *(name for other in gathered for name in other)]:
        values: dict[str, list[int]] = {}
        for rank, other in zip(ranks, gathered, strict=True):
            values.setdefault(repr(other.get(name, "absent")), []).append(rank)
        if len(values) > 1:
            found = ", ".join(f"{value} on {_ranks(of_value)}" for value, of_value in values.items())
            return f"the ranks have parted: {name}: {found}; {_REMEDIES.get(name, _GROUP_REMEDY)}"
    return None


def asks_again(received: Sequence[float]) -> bool:
    """Returns whether a rank needs another reduction, from the sum of all messages."""
    return received[0] > 0


def facts_of_groups(groups: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Returns the hyper-parameters of parameter groups by name, of plain types. Other values are left out."""
    facts: dict[str, object] = {}
    for number, group in enumerate(groups):
        for name, value in group.items():
            plain = _plain(value)
            if name not in ("params", "param_names") and plain is not None:
                facts[f"{name} of parameter group {number}"] = plain
    return facts


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, bool | str):
        return value
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, Real) else None


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
