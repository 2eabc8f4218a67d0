"""Averages flat gradients over the ranks, bucket by bucket, while backward still runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvd_adam.distributed import compression
from hvd_adam.distributed.context import horovod
from hvd_adam.optim.flat_layout import Bucket
from hvd_adam.optim.flat_storage import FlatStorage

# Gradients are reduced in buckets fixed in advance, so that sums do not depend on timing. Large enough to
# use the network's bandwidth, small enough that the first leaves while backward still runs.
BUCKET_BYTES = 8 * 2**20


class Reducer:
    """The buckets of some flat storage, and which of them are under way.

    Beside its gradients every bucket carries one flag a parameter, 1 where this rank has a gradient: their
    sum tells all ranks which parameters no rank has used, without a message of its own.

    Args:
        flats: alike on all ranks.
        prefix: of the names of the collectives; alike on all ranks, and of no other reducer.
        compression: as in `compression.reduce`.
        accumulate: micro-batches to one update.
        scatter: reduce each bucket's parts to their owners only; the flags then travel by themselves.
    """

    def __init__(
        self, flats: Sequence[FlatStorage], prefix: str, compression: str, accumulate: int, scatter: bool = False
    ) -> None:
        self._buckets = [(flat, bucket) for flat in flats for bucket in flat.layout.buckets]
        self._number = {
            p: number
            for number, (flat, bucket) in enumerate(self._buckets)
            for p in flat.params[bucket.first : bucket.last]
        }
        self._prefix, self._compression, self._scatter = prefix, compression, scatter
        self._divisor = horovod().size() * accumulate
        self._under_way: dict[int, compression.Reduction] = {}

    @property
    def groups(self) -> list[tuple[torch.Tensor, ...]]:
        """The parameters of each bucket."""
        return [tuple(flat.params[bucket.first : bucket.last]) for flat, bucket in self._buckets]

    @property
    def under_way(self) -> bool:
        """Whether buckets have been sent and not yet been waited for."""
        return bool(self._under_way)

    @property
    def mean_scale(self) -> float:
        """What makes the mean over ranks and micro-batches of the result of `finish`."""
        divided = compression.divided(self._compression, horovod().size(), self._divisor)
        return divided / self._divisor

    def send(self, p: torch.Tensor) -> None:
        """Starts to reduce the bucket that `p` is in; where the others have no gradient, zeros are sent."""
        number = self._number[p]
        flat, bucket = self._buckets[number]
        present = flat.collect(bucket.first, bucket.last)
        for i, there in enumerate(present, start=bucket.first):
            if not there:
                flat.clear(i)
        _flags(flat, bucket).copy_(torch.tensor(present))
        self._under_way[number] = compression.reduce(
            flat.grad[bucket.start : bucket.end],
            f"{self._prefix}.{number}",
            self._compression,
            self._divisor,
            self._scatter,
        )

    def finish(self, *, add: bool = False) -> torch.Tensor | None:
        """Sends the rest and waits for all; a parameter that no rank has used then has no gradient.

        Args:
            add: also return the sum of all elements, each bucket's taken as it arrives, while it is in cache and
                others are on their way. It is finite on all ranks, or on none: one infinite or NaN element shows.
        """
        for number, (flat, bucket) in enumerate(self._buckets):
            if number not in self._under_way:
                self.send(flat.params[bucket.first])
        for reduction in self._under_way.values():
            reduction.start_gather()
        sums = []
        for number, reduction in self._under_way.items():
            reduction.wait()
            if add:
                flat, bucket = self._buckets[number]
                sums.append(sum_of(self._own(flat.grad, bucket)))
        self._under_way.clear()
        everything, used = self._used(torch.stack(sums).sum() if add else None)
        for (flat, bucket), counts in zip(self._buckets, used, strict=True):
            for p, ranks in zip(flat.params[bucket.first : bucket.last], counts, strict=True):
                if ranks == 0:
                    p.grad = None
            _flags(flat, bucket).zero_()
        return everything

    def _own(self, gradients: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """Of a bucket's gradients those that this rank has the sum of."""
        start, end = (
            bucket.shard(horovod().rank(), horovod().size()) if self._scatter else (bucket.start, bucket.end)
        )
        return gradients[start:end]

    def _used(self, own_sum: torch.Tensor | None) -> tuple[torch.Tensor | None, list[list[float]]]:
        """The sum of all elements, and for each bucket how many ranks have used each parameter (or a multiple)."""
        flags = torch.cat([_flags(flat, bucket).float() for flat, bucket in self._buckets]).cpu()
        if self._scatter:
            rest = [] if own_sum is None else [own_sum.float().cpu().reshape(1)]
            flags = horovod().allreduce(torch.cat([flags, *rest]), op=horovod().Sum, name=f"{self._prefix}.used")
            if own_sum is not None:
                own_sum, flags = flags[-1], flags[:-1]
        parts = flags.split([bucket.last - bucket.first for _, bucket in self._buckets])
        return own_sum, [part.tolist() for part in parts]


def sum_of(gradients: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, added in float32 at least: not finite if one of them is not. 0-dim, float64."""
    return gradients.sum(dtype=torch.promote_types(gradients.dtype, torch.float32)).double()


def _flags(flat: FlatStorage, bucket: Bucket) -> torch.Tensor:
    return flat.grad[bucket.flags : bucket.flags + bucket.last - bucket.first]
