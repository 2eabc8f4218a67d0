"""Iterable data on several ranks: `shard` divides it, `equal_steps` ends all ranks' loops at the same batch."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from hvd_adam.data.samplers.ranks import rank_and_size
from hvd_adam.data.workers.random_state import preserved
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import Cluster, collective_prefix, horovod
from hvd_adam.distributed.join import refuse_in_join
from hvd_adam.errors import JobError, UserError

T = TypeVar("T")
_END: Any = object()  # in place of a batch that a loader does not have


class Shard(IterableDataset[T]):
    """What `shard` returns: an `IterableDataset` that yields every N-th item."""

    def __init__(self, items: Iterable[T], rank: int, size: int) -> None:
        self._items, self._rank, self._size = items, rank, size
        self._is_used_up = False

    def __iter__(self) -> Iterator[T]:
        source = iter(self._items)
        if self._is_used_up:  # each rank, and its workers, would continue at another place
            kind = type(self._items).__name__
            raise UserError(
                f"shard has a {kind}, which can be read once only, and this is a second pass: give a list or "
                "another object whose __iter__ starts again"
            )
        self._is_used_up = source is self._items
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return islice(source, self._rank * workers + number, None, self._size * workers)


def shard(items: Iterable[T], *, rank: int | None = None, size: int | None = None) -> Shard[T]:
    """Divides items among the ranks and, in a `DataLoader`, their workers: each gets every N-th item.

    Together they yield every item once; shares differ by at most one item. Every one of them iterates over all
    items and skips those of the others. Where reading an item is slow, divide the names of files instead.

    Args:
        items: samples, or names of files; the same on every rank, in the same order. With workers that are
            spawned, it must be picklable. A second pass over an iterator, such as a generator, raises `UserError`.
        rank: of this process; by default that of the running job, and 0 in a single process.
        size: number of ranks, likewise.

    Raises:
        UserError: a launcher started several ranks, but `init` has not been called.

    Example:
        >>> loader = DataLoader(shard(stream), batch_size=32, num_workers=2)
    """
    return Shard(items, *rank_and_size(rank, size))


def equal_steps(
    loader: Iterable[T], cluster: Cluster, *, until: str = "first", accumulate: int = 1
) -> EqualSteps[T]:
    """Yields a loader's batches, equally many on every rank, whatever each rank's loader has.

    Before each update the ranks exchange one small message, which is sent while the loop works on the batch
    before. For this, batches are read one update ahead. Every rank creates it and iterates over it equally often,
    and leaves the loop at the same batch, if at all. It replaces `optimizer.join()` and cannot be used in its
    block.

    If a loader raises an exception, every rank raises one in place of the next update: a `UserError` is raised on
    every rank; any other exception on its own rank, and `JobError` with its text, rank and host on the others.

    Args:
        loader: this rank's batches, such as a `DataLoader` of an `IterableDataset`.
        cluster: this process.
        until: "first": the loop ends when a rank has no batches left for an update; the remaining ones of the
            other ranks are dropped. "last": it ends when no rank has one; a rank without a batch gets None, skips
            `backward` and calls `step`, and its gradient counts as zero.
        accumulate: batches per update, as `accumulate` of `distribute`: the number of batches is a multiple of it.

    Raises:
        CollectiveError: on every rank, if a value is invalid on any, or the ranks' arguments differ.

    Example:
        >>> for images, labels in equal_steps(loader, cluster):
        ...     loss_function(model(images), labels).backward()
        ...     optimizer.step()
    """
    with raise_on_all_ranks(cluster):
        if until not in ("first", "last"):
            raise UserError(f"until is {until!r}; use first or last")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise UserError(f"accumulate is {accumulate!r}; it must be a whole number, at least 1")
    require_same(cluster, "arguments of equal_steps", {"until": until, "accumulate": accumulate})
    return EqualSteps(loader, cluster, until, accumulate)


class EqualSteps(Generic[T]):
    """The iterable that `equal_steps` returns; each iteration is one pass over the loader."""

    def __init__(self, loader: Iterable[T], cluster: Cluster, until: str, accumulate: int) -> None:
        self._loader, self._cluster, self._until, self._accumulate = loader, cluster, until, accumulate
        self._taken = self._skip = 0

    def state_dict(self) -> dict[str, int]:
        """Returns how many batches of complete updates the loop has taken in this pass, and the number of ranks.

        It is identical on all ranks.
        """
        return {"batches": self._taken // self._accumulate * self._accumulate, "ranks": self._cluster.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Lets the next pass skip the batches of a saved state, on the same number of ranks.

        The loader reads and drops them, so this takes as long as loading them; and its order must be what it was.
        Meanwhile PyTorch's generator of the CPU, NumPy's and Python's stay as they are.

        Args:
            state: from `state_dict`.

        Raises:
            UserError: it is not such a state, or is of another number of ranks. In the next pass, on every rank:
                with `until="first"` a rank has fewer batches than the state.
        """
        batches, size = state.get("batches"), self._cluster.size
        if not isinstance(batches, int) or batches < 0:
            raise UserError(f"the state of equal_steps is {dict(state)!r}: load one from its state_dict()")
        ranks = state.get("ranks", size)  # older states have none
        if batches and ranks != size:
            raise UserError(
                f"the state of equal_steps is of {ranks} ranks, but the job has {size}, whose batches are others: "
                f"use {ranks} ranks, or start the pass again without the state"
            )
        self._skip = self._taken = batches

    def __iter__(self) -> Iterator[Any]:
        if self._cluster.size > 1:
            refuse_in_join()
        source, agreement = _Source(self._loader), _Agreement(self._cluster)
        # What opening the loader and reading so far draws, the seed of `iter(DataLoader)` for example, was drawn
        # before the state was saved, with the update ahead: restored generators must not advance by it again.
        with preserved() if self._skip else nullcontext():
            for number in range(self._skip):
                source.skip(number, self._skip, may_end=self._until == "last")
            upcoming = [source.read() for _ in range(self._accumulate)]
        self._taken, self._skip = self._skip, 0
        agreement.start(self._has(upcoming), source.error)
        while self._continues(agreement.ranks_with_batches()):
            current, upcoming = upcoming, []
            for batch in current:
                upcoming.append(source.read())
                if len(upcoming) == self._accumulate:
                    agreement.start(self._has(upcoming), source.error)
                self._taken += 1
                yield None if batch is _END else batch
        self._taken = 0

    def _has(self, update: list[Any]) -> bool:
        """Returns whether this rank takes part in an update: with all its batches, or until "last" with any."""
        return update[-1 if self._until == "first" else 0] is not _END

    def _continues(self, ranks: int) -> bool:
        return ranks == self._cluster.size if self._until == "first" else ranks > 0


class _Source:
    """Reads a loader to its end or its first error, which is kept for all ranks to agree on."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._batches = self._open(loader)
        self.error: Exception | None = None

    @staticmethod
    def _open(loader: Iterable[Any]) -> Iterator[Any]:
        yield from loader  # so that an error of iter(loader) is one of `read`

    def read(self) -> Any:
        """Returns the next batch, or `_END`."""
        try:
            return next(self._batches, _END)  # a generator that has raised an exception has ended
        except Exception as error:
            self.error = error
            return _END

    def skip(self, number: int, batches: int, *, may_end: bool) -> None:
        """Drops a batch of those that a saved state has; that there is none is an error unless it may be so."""
        if self.read() is _END and not may_end and self.error is None:
            self.error = UserError(
                f"the loader has {number} batches, but {batches} were taken before the saved state: use the same "
                "data and batch size, or start the pass again without the state"
            )


class _Agreement:
    """Adds up, in the background, how many ranks have batches for the next update and how many have failed."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._name = f"{collective_prefix()}.equal_steps"
        self._error: Exception | None = None
        self._request: Any = None

    def start(self, has_batches: bool, error: Exception | None) -> None:
        self._error = error
        # Integers are never fused with gradients, so the order of additions of those does not change.
        self._request = torch.tensor([has_batches, error is not None], dtype=torch.int32, device="cpu")
        if self._cluster.size > 1:
            self._request = horovod().allreduce_async(self._request, op=horovod().Sum, name=self._name)

    def ranks_with_batches(self) -> int:
        """Waits for the other ranks; raises an error on every rank if a loader has failed on any."""
        sums = horovod().synchronize(self._request) if self._cluster.size > 1 else self._request
        ranks, failures = sums.tolist()
        if failures:
            self._raise()
        return int(ranks)

    def _raise(self) -> NoReturn:
        error = self._error
        with raise_on_all_ranks(self._cluster):
            if isinstance(error, UserError):
                raise UserError(_last_line(error)) from error
        where = f"rank {self._cluster.rank} on {socket.gethostname()}"
        own = None if error is None else f"the loader of {where} failed: {_last_line(error)}"
        texts = horovod().allgather_object(own, name=self._name) if self._cluster.size > 1 else [own]
        if error is not None:
            raise error
        raise JobError(next(filter(None, texts)))


def _last_line(error: Exception) -> str:
    """Returns an error without the traceback that a DataLoader adds to the text of those of its workers."""
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    return line.rpartition("UserError: ")[2] if isinstance(error, UserError) else line
