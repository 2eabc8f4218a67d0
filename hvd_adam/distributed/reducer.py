"""Averages gradients over the ranks, bucket by bucket, while backward is still running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.compression import AdasumCompression, Reduction, applied_divisor, start_reduction
from hvd_adam.distributed.context import collective_prefix, horovod
from hvd_adam.distributed.grad_scaling import element_sum
from hvd_adam.distributed.horovod_adapter import HorovodAdapter, prefixed
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam
from hvd_adam.optim.flat_layout import Bucket, Layout
from hvd_adam.optim.flat_storage import FlatStorage

# Gradients are reduced in fixed buckets, so that sums do not depend on timing. Large enough to use the network's
# bandwidth, small enough that the first reduction starts while backward is still running.
BUCKET_BYTES = 8 * 2**20


class Reducer:
    """The buckets of flat gradients, and the reductions in flight.

    Next to its gradients every bucket has one flag per parameter, 1 if this rank has a gradient. The sum of the
    flags shows all ranks which parameters no rank has used, without another message.

    Args:
        storages: identical on all ranks.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other reducer.
        compression: as in `start_reduction`.
        accumulate: micro-batches per update.
        scatter: reduce each shard of a bucket to its owner only; the flags are then reduced separately.
    """

    def __init__(
        self,
        storages: Sequence[FlatStorage],
        prefix: str,
        compression: str,
        accumulate: int,
        scatter: bool = False,
    ) -> None:
        self._buckets = [(flat, bucket) for flat in storages for bucket in flat.layout.buckets]
        self._number = {
            p: number
            for number, (flat, bucket) in enumerate(self._buckets)
            for p in flat.params[bucket.first : bucket.last]
        }
        self._prefix, self._compression, self._scatter = prefix, compression, scatter
        self._divisor = horovod().size() * accumulate
        self._in_flight: dict[int, Reduction] = {}

    @property
    def parameters(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each bucket."""
        return [tuple(flat.params[bucket.first : bucket.last]) for flat, bucket in self._buckets]

    @property
    def in_flight(self) -> bool:
        """Whether a reduction has been started and not been waited for."""
        return bool(self._in_flight)

    @property
    def mean_scale(self) -> float:
        """The factor that makes the mean over ranks and micro-batches of the result of `finish`."""
        applied = applied_divisor(self._compression, int(horovod().size()), self._divisor)
        return float(applied / self._divisor)

    def send(self, p: Tensor) -> None:
        """Starts to reduce the bucket that contains `p`, with zeros for parameters without a gradient."""
        number = self._number[p]
        flat, bucket = self._buckets[number]
        present = flat.collect(bucket.first, bucket.last)
        for i, has_grad in enumerate(present, start=bucket.first):
            if not has_grad:
                flat.clear(i)
        _flags(flat, bucket).copy_(torch.tensor(present))
        self._in_flight[number] = start_reduction(
            flat.grad[bucket.start : bucket.end],
            f"{self._prefix}.{number}",
            self._compression,
            self._divisor,
            self._scatter,
        )

    def finish(self, *, add: bool = False) -> Tensor | None:
        """Starts the remaining reductions and waits for all. Sets gradients that no rank has to None.

        Args:
            add: also compute the sum of all elements, each bucket's as soon as it arrives, while it is in cache
                and others are in flight.

        Returns:
            The sum, or None. It is finite if all elements are, and that on all ranks or on none.
        """
        for number, (flat, bucket) in enumerate(self._buckets):
            if number not in self._in_flight:
                self.send(flat.params[bucket.first])
        for reduction in self._in_flight.values():
            reduction.start_gather()
        sums = []
        for number, reduction in self._in_flight.items():
            reduction.wait()
            if add:
                flat, bucket = self._buckets[number]
                sums.append(element_sum(self._own(flat.grad, bucket)))
        self._in_flight.clear()
        total, used = self._used(torch.stack(sums).sum() if add else None)
        for (flat, bucket), counts in zip(self._buckets, used, strict=True):
            for p, ranks in zip(flat.params[bucket.first : bucket.last], counts, strict=True):
                if ranks == 0:
                    p.grad = None
            _flags(flat, bucket).zero_()
        return total

    def _own(self, gradients: Tensor, bucket: Bucket) -> Tensor:
        """Returns the gradients of a bucket that this rank has the sum of."""
        start, end = (
            bucket.shard(horovod().rank(), horovod().size()) if self._scatter else (bucket.start, bucket.end)
        )
        return gradients[start:end]

    def _used(self, own_sum: Tensor | None) -> tuple[Tensor | None, list[list[float]]]:
        """Returns the sum of all elements, and by parameter a multiple of the number of ranks that used it."""
        flags = torch.cat([_flags(flat, bucket).float() for flat, bucket in self._buckets]).cpu()
        if self._scatter:
            rest = [] if own_sum is None else [own_sum.float().cpu().reshape(1)]
            flags = horovod().allreduce(torch.cat([flags, *rest]), op=horovod().Sum, name=f"{self._prefix}.used")
            if own_sum is not None:
                own_sum, flags = flags[-1], flags[:-1]
        parts = torch.split(flags, [bucket.last - bucket.first for _, bucket in self._buckets])
        return own_sum, [part.tolist() for part in parts]


def _flags(flat: FlatStorage, bucket: Bucket) -> Tensor:
    return flat.grad[bucket.flags : bucket.flags + bucket.last - bucket.first]


class AveragingAdam(Adam):
    """`Adam` with gradients that are reduced over the ranks while backward is running, in flat buffers."""

    scatters = False  # whether each rank gets the reduced gradients of its own shard only

    _adapter: HorovodAdapter | None = None  # from the end of construction on
    _reducer: Reducer | None = None  # on several ranks, without Adasum

    def _configure(self, model: torch.nn.Module, accumulate: int, compression: str, op: str) -> None:
        self._hvd = horovod()
        self._prefix = collective_prefix()  # of the names of its collectives
        self._model = model
        self._accumulate, self._compression = accumulate, compression
        self._single_rank = self._hvd.size() == 1
        self._adasum = op == "adasum" and not self._single_rank
        self._always_flat = not self._single_rank and not self._adasum

    def _update_from_step(self) -> None:
        """Updates the parameters; called inside `step` of the wrapped optimizer."""
        raise NotImplementedError

    def _finish_reductions(self, *, add: bool) -> tuple[float, Tensor | None]:
        """Waits for the sum of every gradient over the ranks.

        Args:
            add: also compute the sum of all elements.

        Returns:
            The factor that makes the mean of the result, and the sum of all elements or None.
        """
        if self._reducer is None:
            return 1 / self._accumulate, self._local_sum() if add else None
        self._refuse_unhooked()
        total = self._reducer.finish(add=add)
        self._horovod.rearm()
        return self._reducer.mean_scale, total

    def _local_sum(self) -> Tensor | None:
        """Returns the sum of all elements of this rank's gradients."""
        spans = [(flat, span) for flat in self._storages for span in flat.spans(flat.collect())]
        sums = [element_sum(flat.grad[start:end]) for flat, (start, end) in spans]
        sums += [element_sum(p.grad) for p in self._unflattened if p.grad is not None]
        return torch.stack([value.to(sums[0].device) for value in sums]).sum() if sums else None

    def _refuse_unhooked(self) -> None:
        parameter = self._horovod.first_unhooked(self._parameters())
        if parameter is not None:
            raise RuntimeError(
                f"{self._names()[parameter]} has a gradient but was frozen when distribute() was called, so "
                "it would not be averaged; freeze it again, or call distribute() after unfreezing"
            )

    # Storage.

    def _make_storage(self, params: list[Tensor], groups: list[int]) -> FlatStorage:
        layout = Layout.of(params, BUCKET_BYTES if self._always_flat else None)
        return FlatStorage(params, groups, self.state, layout)

    def _build_layout(self) -> None:
        super()._build_layout()
        if not self._always_flat:
            return
        for p in self._unflattened:
            if p.requires_grad:
                raise UserError(
                    f"{self._names()[p]} shares memory with another parameter, or is no ordinary tensor, and "
                    "cannot be averaged: to tie parameters, use the same torch.nn.Parameter object"
                )
        prefix = collective_prefix()
        self._reducer = Reducer(self._storages, prefix, self._compression, self._accumulate, self.scatters)
        if self._adapter is not None:
            self._adapter.set_buckets(self._reducer.parameters)

    def _compile_error(self, resolved: list[str]) -> str | None:
        """Returns the same on all ranks: if one rank cannot compile, none must, or the ranks would drift apart."""
        errors = [super()._compile_error(resolved)]
        if not self._single_rank:
            errors = self._hvd.allgather_object(errors[0], name="hvd_adam.kernels")
        return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)

    def _warn_unfused(self, problem: str) -> None:
        if self._hvd.rank() == 0:
            super()._warn_unfused(problem)

    # Horovod.

    @property
    def _horovod(self) -> HorovodAdapter:
        assert self._adapter is not None  # the constructor has ended
        return self._adapter

    def _wrap(self, optimizer: Adam) -> None:
        overrides: dict[str, Callable[..., Any]] = {"_update": lambda: self._update_from_step()}
        if self._adasum:
            # It steps one parameter at a time: a flat buffer for each would gain nothing.
            overrides = {"_resolve_implementations": lambda: ["foreach"] * len(self.param_groups)}
        self._adapter = HorovodAdapter(
            optimizer,
            prefixed(self._prefix, self._names(), self._parameters()),
            accumulate=self._accumulate,
            compression=AdasumCompression(self._compression),
            adasum=self._adasum,
            buckets=self._reducer.parameters if self._reducer else None,
            reduce_bucket=self._reduce_bucket,
            overrides=overrides,
        )
        self._adapter.share(self)
        if self._adasum:
            # Horovod has set zero gradients, with which unused parameters would be updated.
            super().zero_grad()

    @torch.no_grad()
    def _reduce_bucket(self, bucket: tuple[Tensor, ...]) -> None:
        """Starts to reduce a bucket; a backward hook calls it once the bucket's gradients are complete."""
        reducer = self._reducer
        if reducer is not None and not reducer.in_flight:
            self._ensure_layout()
        if self._reducer is reducer and reducer is not None:
            reducer.send(bucket[0])
        # Otherwise the buckets have just changed, and this one may not be complete: finish() sends the rest.

    def _in_flight(self) -> bool:
        return self._horovod.in_flight or (self._reducer is not None and self._reducer.in_flight)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> dict[Tensor, str]:
        """Returns a name for every parameter, identical on all ranks: the model's where it has one."""
        names: dict[Tensor, str] = {
            p: f"param_groups.{i}.{j}"
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
        }
        return names | {p: name for name, p in self._model.named_parameters() if p in names}
