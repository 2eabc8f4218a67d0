"""`StatefulDistributedSampler`: a rank's share of each global batch, for a `DataLoader`.

    sampler = StatefulDistributedSampler(dataset, global_batch_size=64)
    loader = sampler.loader(num_workers=4)
    for epoch in range(sampler.epoch, 20):
        for images, labels in loader:
            ...

A `DataLoader` with workers reads indices ahead of the loop. What a checkpoint needs is what the loop has taken, so
the loader counts that, not the sampler.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from hvd_adam.data.samplers.ranks import rank_and_size
from hvd_adam.data.samplers.subsets import chosen_samples
from hvd_adam.data.sampling import batch_share, epoch_order, steps_per_epoch
from hvd_adam.data.workers.random_state import preserved
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import running_cluster
from hvd_adam.errors import UserError

T = TypeVar("T")


class StatefulDistributedSampler(Sampler[list[int]]):
    """Batches of indices: this rank's share of each global batch. A `batch_sampler` of a `DataLoader`.

    Global batch t of an epoch is the same set of samples at any number of ranks. All ranks have the same number of
    batches of the same size, so that the mean of the ranks' mean gradients is the mean over the global batch. The
    last, incomplete global batch of an epoch is dropped; the order changes with the epoch, so other samples are
    dropped each time.

    Every rank creates it. Without `rank` and `size` the ranks compare their arguments.

    Args:
        dataset: a data set with a length, or its length.
        batch_size: samples in a batch of one rank; the global batch is `batch_size * size * accumulate`.
        global_batch_size: samples per update over all ranks, in place of `batch_size`; a multiple of
            `size * accumulate`. The run may then resume on another number of ranks.
        accumulate: batches per update and rank, as `accumulate` of `distribute`; at least 1.
        shuffle: whether each epoch has a random order of its own; otherwise the samples are in order.
        seed: of the order, in [0, 2⁶⁴).
        rank: of this process; by default that of the running job, and 0 in a single process.
        size: number of ranks, likewise.

    Attributes:
        accumulate: as given.
        batch_size: samples in a batch of one rank.
        global_batch_size: samples per update over all ranks.
        rank: of this process.
        size: number of ranks.

    Raises:
        UserError: a value is out of range, or the global batch cannot be divided evenly; a launcher started
            several ranks, but `init` has not been called. On every rank, if the ranks' arguments differ, or the
            indices of a `Subset`.

    Example:
        >>> sampler = StatefulDistributedSampler(dataset, global_batch_size=64)
        >>> loader = sampler.loader(num_workers=4)
    """

    def __init__(
        self,
        dataset: Sized | int,
        batch_size: int | None = None,
        *,
        global_batch_size: int | None = None,
        accumulate: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        size: int | None = None,
    ) -> None:
        cluster = running_cluster() if rank is None and size is None else None
        self.rank, self.size = rank_and_size(rank, size)
        self._dataset, self._shuffle, self._seed = dataset, shuffle, seed
        with nullcontext() if cluster is None else raise_on_all_ranks(cluster):
            self._samples = _length(dataset)
            if not isinstance(seed, int | np.integer):
                raise UserError(f"the seed is {seed!r}; it must be a whole number, at least 0")
            self.accumulate = accumulate = _at_least_1("accumulate", accumulate)
            self.global_batch_size = _global_batch_size(batch_size, global_batch_size, self.size, accumulate)
            self.batch_size = self.global_batch_size // (self.size * accumulate)
            self._steps = steps_per_epoch(self._samples, self.global_batch_size)
            self._order_of(0)  # refuses a bad seed
        if cluster is not None:
            own = self._arguments() | {"accumulate": accumulate, "indices of a Subset": chosen_samples(dataset)}
            require_same(cluster, "arguments of StatefulDistributedSampler", own)
        self._epoch = self._first_step = 0  # where the next iteration starts
        self._taken = 0  # batches of the epoch that the loop has taken
        self._untracked = False  # whether batches were read that nobody counts
        self._repeats = False  # whether another iteration would show the same samples again

    @property
    def epoch(self) -> int:
        """The current epoch, from 0; after the last batch of `loader()` or `track`, the next one."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch; a position that `load_state_dict` has set in the same epoch is kept.

        `loader()` and `track` count epochs themselves. A `DataLoader` of your own needs this call before each one.

        Args:
            epoch: ≥ 0.

        Raises:
            UserError: it is negative.
        """
        if not isinstance(epoch, int | np.integer) or epoch < 0:
            raise UserError(f"the epoch is {epoch!r}; it must be a whole number, at least 0")
        epoch = int(epoch)
        self._start_from(epoch, self._first_step if epoch == self._epoch else 0)

    def __len__(self) -> int:
        """Returns the number of this rank's batches in an epoch."""
        return self._steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        if self._repeats:
            warnings.warn(
                f"epoch {self._epoch} starts again with the same samples: after `break`, and with a DataLoader of "
                "your own, call set_epoch() before each epoch",
                RuntimeWarning,
                stacklevel=2,
            )
        self._untracked = True
        return _Batches(self, self._order_of(self._epoch), self._first_step * self.accumulate)

    def loader(self, **options: Any) -> DataLoader[Any]:
        """Returns a `DataLoader` of this rank's batches that counts what the loop takes, and the epochs.

        Its random seeds for workers do not touch PyTorch's global generator, so that a resumed run draws the same
        numbers.

        Args:
            options: of `DataLoader`, such as `num_workers` and `multiprocessing_context`.

        Raises:
            UserError: the sampler was created with a length instead of a data set; `in_order=False`, with which
                a number of batches does not say which ones.
        """
        if isinstance(self._dataset, int | np.integer):
            raise UserError("the sampler was created with a length: create it with the data set")
        if not options.get("in_order", True):
            raise UserError("in_order=False cannot be resumed: leave it out")
        return _CountingLoader(self._dataset, batch_sampler=self, **options)

    def track(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields the batches of a loader of your own, and counts them for `state_dict`.

        Args:
            batches: a loader with this sampler as `batch_sampler`, or what wraps one; its batches are in order.
        """
        epoch, taken = self._epoch, self._first_step * self.accumulate
        self._taken = taken
        # In the middle of an epoch, iter(DataLoader) had drawn its seed before the state was saved.
        with preserved() if self._first_step else nullcontext():
            opened = iter(batches)
        for batch in opened:
            self._repeats |= taken > self._first_step * self.accumulate  # one batch may be a look at its shape
            taken += 1
            self._taken, self._untracked = taken, False
            yield batch
        self._start_from(epoch + 1, 0)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loop is, as plain numbers: after the last complete update that it has the batches of.

        Raises:
            UserError: a `DataLoader` of your own reads the sampler without `track`.
        """
        taken = self._taken
        if self._untracked:
            # torchdata's StatefulDataLoader saves the sampler together with its iterator, which has the count.
            if not sys._getframe(1).f_globals["__name__"].startswith("torchdata."):
                raise UserError(
                    "the sampler cannot know how many batches the loop has taken, because a DataLoader reads "
                    "ahead: loop over sampler.loader(...) or sampler.track(loader), or save the state_dict() of "
                    "torchdata's StatefulDataLoader"
                )
            taken = self._first_step * self.accumulate
        return {"epoch": self._epoch, "step": taken // self.accumulate, **self._arguments()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batches of a saved state, on any number of ranks with the same global batch.

        Args:
            state: from `state_dict`.

        Raises:
            UserError: it is not such a state, or is of other data, seed or global batch; the message names both.
        """
        own = self._arguments()
        if missing := {"epoch", "step", *own} - state.keys():
            first = sorted(missing)[0]
            raise UserError(f"the state has no {first!r}: load what state_dict() of a sampler returned")
        for name, value in own.items():
            if state[name] != value:
                raise UserError(
                    f"{name} of the sampler is {value}, but {state[name]} in the saved state: use the same, or "
                    "start without the saved state"
                )
        epoch, step = state["epoch"], state["step"]
        if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 and 0 <= step <= self._steps):
            raise UserError(
                f"the state is of epoch {epoch!r} and step {step!r}, but an epoch has {self._steps} steps: load "
                "what state_dict() of a sampler returned"
            )
        self._start_from(epoch, step)

    def _arguments(self) -> dict[str, Any]:
        """Returns what decides which samples a global batch has."""
        return {
            "samples": self._samples,
            "global_batch_size": self.global_batch_size,
            "shuffle": self._shuffle,
            "seed": self._seed,
        }

    def _start_from(self, epoch: int, step: int) -> None:
        self._epoch, self._first_step = epoch, step
        self._taken = step * self.accumulate
        self._untracked = self._repeats = False

    def _order_of(self, epoch: int) -> np.ndarray:
        order = epoch_order(self._samples if self._shuffle else 0, self._seed, epoch)
        return order if self._shuffle else np.arange(self._samples)

    def _batch(self, order: np.ndarray, number: int) -> list[int]:
        """Returns the indices of this rank's batch with a number below `len(self)`."""
        step, micro_batch = divmod(number, self.accumulate)
        share = {"rank": self.rank, "size": self.size, "accumulate": self.accumulate}
        part = batch_share(order, step, global_batch_size=self.global_batch_size, micro_batch=micro_batch, **share)
        return [int(index) for index in part]

    def _worker_seed(self) -> int:
        """Returns a seed for the workers of the next iteration, below 2⁶³, another one on each rank."""
        place = np.random.SeedSequence([self._seed, self._epoch, self._first_step, self.rank])
        return int(place.generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Batches(Iterator[list[int]]):
    """A rank's batches from a position in an epoch. Has the state that torchdata's StatefulDataLoader saves."""

    def __init__(self, sampler: StatefulDistributedSampler, order: np.ndarray, first: int) -> None:
        self._sampler, self._order, self._next = sampler, order, first

    def __next__(self) -> list[int]:
        if self._next >= len(self._sampler):
            self._sampler._repeats = True
            raise StopIteration
        self._next += 1
        return self._sampler._batch(self._order, self._next - 1)

    def state_dict(self) -> dict[str, int]:
        return {"batches": self._next, "accumulate": self._sampler.accumulate}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        step, micro_batch = divmod(state["batches"], state["accumulate"])
        accumulate = self._sampler.accumulate
        self._next = step * accumulate + (micro_batch if accumulate == state["accumulate"] else 0)


class _CountingLoader(DataLoader[Any]):
    def __init__(self, dataset: Any, batch_sampler: StatefulDistributedSampler, **options: Any) -> None:
        self._seeds = None if "generator" in options else torch.Generator()
        super().__init__(dataset, batch_sampler=batch_sampler, **{"generator": self._seeds, **options})
        self._sampler = batch_sampler

    def __iter__(self) -> Any:
        if self._seeds is not None:
            self._seeds.manual_seed(self._sampler._worker_seed())
        return self._sampler.track(super().__iter__())


def _length(dataset: Sized | int) -> int:
    if isinstance(dataset, int | np.integer):
        return int(dataset)
    if not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise UserError(f"the data set is a {kind}, which has no length: use hvd_adam.data.shard and equal_steps")
    return len(dataset)


def _global_batch_size(batch_size: int | None, global_batch_size: int | None, size: int, accumulate: int) -> int:
    if (batch_size is None) == (global_batch_size is None):
        raise UserError(
            "give either batch_size, the samples of one rank, or global_batch_size, those of all ranks"
        )
    parts = size * accumulate
    if batch_size is not None:
        return _at_least_1("batch_size", batch_size) * parts
    total = _at_least_1("global_batch_size", global_batch_size)
    if total % parts:
        raise UserError(
            f"global_batch_size is {total}, which cannot be divided evenly among {size} ranks x "
            f"{accumulate} accumulated batches: use a multiple of {parts}"
        )
    return total


def _at_least_1(name: str, value: int | None) -> int:
    if not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number, at least 1")
    return int(value)
