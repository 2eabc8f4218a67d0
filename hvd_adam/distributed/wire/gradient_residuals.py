"""`GradientResiduals`: what codes miss of the gradients, and how it is added to those of the next updates.

Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847. The residuals are in units of the mean gradient,
without the loss scale. Their sum over the ranks is what updates have not received yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import ALIGNMENT
from hvd_adam.distributed.gradients.compression import AllReduce, Scaling
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codable import require_codable
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.coded_allreduce import CodedAllReduce, CodedReduceScatter, exact_name
from hvd_adam.distributed.wire.coded_bucket import CodedBucket
from hvd_adam.distributed.wire.masters import Coded, Masters

Residuals = dict[Tensor, Tensor]  # by parameter, with its shape


class HasResiduals(Protocol):
    """An optimizer."""

    @property
    def error_feedback(self) -> GradientResiduals | None:
        """Its residuals."""


class GradientResiduals:
    """The residuals of an optimizer's gradients: they follow the parameters through every change of buckets.

    Residuals change when an update is made, and on all ranks or on none: not by gradients that are not finite, nor
    by gradients that are cleared without an update.

    After codes have been replaced by another compression, every rank adds its residuals to its gradients once.

    Args:
        compression: of `distribute`, without "auto".
        names: returns a name for every parameter, identical on all ranks.
        exact: returns the parameters whose gradients are sent exactly; see `exact_parameters`.
        unit: returns the loss scale.
        retired: optimizers that had some of the parameters until now; their residuals are taken over.
        masters: of the parameters, if codes give each rank the gradients of its own shard only; else None.
        switches: whether `use` will be called: shards of buckets are then made for all codes.

    Attributes:
        compression: the one in use.
        shard_multiple: the length of a shard of a bucket must be a multiple of it.
    """

    def __init__(
        self,
        compression: str,
        names: Callable[[], Mapping[Tensor, str]],
        exact: Callable[[], set[Tensor]],
        unit: Callable[[], float],
        retired: Iterable[HasResiduals] = (),
        masters: Masters | None = None,
        *,
        switches: bool = False,
    ) -> None:
        self.compression, self._codec = compression, CODECS.get(compression)
        self._names, self._exact, self._unit, self._masters = names, exact, unit, masters
        blocks = [codec.block for name, codec in CODECS.items() if switches or name == compression]
        self.shard_multiple = ALIGNMENT if masters is None else math.lcm(*blocks)
        self._buckets: list[CodedBucket | None] = []
        self._round_unit: float | None = None  # the loss scale of the round in flight
        own, before = names(), filter(None, (optimizer.error_feedback for optimizer in retired))
        found = [item for feedback in before for item in feedback.by_parameter().items()]
        # Of parameters that are in no coded bucket, such as frozen ones.
        self._parked: Residuals = {p: residual for p, residual in found if p in own}
        self._reduced: set[Tensor] = set()  # the parameters in buckets
        self._waiting: set[Tensor] = set()  # those of them that are reduced without codes
        self._added: set[Tensor] = set()  # those that have been added to gradients since the last update

    @property
    def sends_codes(self) -> bool:
        """Whether gradients are sent as codes."""
        return self._codec is not None

    @property
    def in_use(self) -> bool:
        """Whether reductions have to do with residuals."""
        return self.sends_codes or bool(self._waiting)

    @property
    def _coded(self) -> list[CodedBucket]:
        return [bucket for bucket in self._buckets if bucket is not None]

    # Layout.

    def arrange(self, buffers: Sequence[GradientBuffer]) -> None:
        """Moves the residuals to the places that their parameters have in new buckets.

        Args:
            buffers: of the gradients.
        """
        committed, latest = self.by_parameter(), self.by_parameter(latest=True)
        pending = self._is_pending
        divided = self._make_buckets(buffers)
        if self._masters is not None and self.sends_codes:
            self._masters.arrange(divided)
        self._put(committed)
        if pending:
            for coded in self._coded:
                coded.put_pending(latest)

    def use(self, compression: str, buffers: Sequence[GradientBuffer]) -> None:
        """Changes the compression. Called after an update; masters have become the parameters if codes end.

        Args:
            compression: the new one.
            buffers: of the gradients.
        """
        self.roll_back()
        residuals, coded_before = self.by_parameter(), self.sends_codes
        self.compression, self._codec = compression, CODECS.get(compression)
        divided = self._make_buckets(buffers)
        if self._masters is not None and self._codec is not None:
            self._masters.use(self._codec)
            if not coded_before:
                self._masters.arrange(divided)
        self._put(residuals)

    def _make_buckets(self, buffers: Sequence[GradientBuffer]) -> list[Coded]:
        if self._codec is not None:  # before anything changes
            trained = (p for buffer in buffers for p in buffer.params)
            require_codable(trained, self._names(), self.compression)
        exact = self._exact()
        rank, ranks = horovod().rank(), horovod().size()
        self._buckets, self._reduced = [], {p for buffer in buffers for p in buffer.params}
        divided: list[Coded] = []
        if self._codec is None:
            return divided
        for buffer in buffers:
            for bucket in buffer.layout.buckets:
                params = buffer.params[bucket.first : bucket.last]
                kept = exact.union(p for p in params if p.dim() < 2)
                coded = None
                if not kept.issuperset(params):
                    scatter = self._masters is not None
                    coded = CodedBucket(self._codec, buffer, bucket, kept, rank, ranks, scatter=scatter)
                self._buckets.append(coded)
                divided.append((buffer, bucket, {} if coded is None else coded.params))
        return divided

    def by_parameter(self, *, latest: bool = False) -> Residuals:
        """Returns the residual of every parameter on this rank; see `CodedBucket.by_parameter`."""
        found = dict(self._parked)
        for bucket in self._coded:
            found.update(bucket.by_parameter(latest=latest))
        return found

    def _put(self, residuals: Residuals) -> None:
        """Replaces residuals that are 0."""
        self._parked = dict(residuals)
        for bucket in self._coded:
            bucket.put(residuals)
            for p in bucket.params:
                self._parked.pop(p, None)
        self._waiting = self._reduced & self._parked.keys() if self._codec is None else set()
        self._added &= self._waiting

    # Reductions.

    def coded(self, number: int) -> Collection[Tensor]:
        """Returns the parameters of a bucket that are sent as codes."""
        coded = self._buckets[number]
        return () if coded is None else coded.params.keys()

    def start(
        self,
        number: int,
        gradients: Tensor,
        name: str,
        scaling: Scaling,
        elsewhere: Mapping[Tensor, Tensor],
        meanwhile: Callable[[], bool],
    ) -> AllReduce | CodedAllReduce:
        """Starts to add a bucket over all ranks, as codes; the arguments are those of `CodedAllReduce`."""
        coded = self._buckets[number]
        if coded is None:
            return AllReduce(gradients, exact_name(name), "none", scaling=scaling)
        coded.unit = self._unit_of_round()
        kind = CodedAllReduce if self._masters is None else CodedReduceScatter
        return kind(gradients, name, coded, scaling, elsewhere, meanwhile)

    def add_waiting(self, p: Tensor, gradient: Tensor, factor: float) -> None:
        """Adds the residual of a parameter, if it has one, to its gradient, which is sent without codes.

        Every rank does so, whether it has a gradient or not: all know which parameters the update has used.

        Args:
            p: the parameter.
            gradient: what this rank sends for it.
            factor: multiplies what it sends before it is added over the ranks.
        """
        if p in self._waiting and p not in self._added:
            gradient.add_(self._parked[p], alpha=self._unit_of_round() / factor)
            self._added.add(p)

    def _unit_of_round(self) -> float:
        if self._round_unit is None:
            self._round_unit = self._unit()  # once a round: a GPU is waited for
        return self._round_unit

    def finish(self, total: Tensor) -> None:
        """Called after a round, on every rank.

        Args:
            total: finite if all elements of the gradients are; the same on all ranks.
        """
        self._round_unit = None
        if not total.isfinite():
            self.roll_back()

    def take_back(self, number: int, p: Tensor, gradient: Tensor) -> None:
        """Called for a parameter that no rank has a gradient for: what has been sent for it is no gradient's.

        Neighbours in a block, and the residual of the sum, make it different from 0. Every rank takes the same
        part back.

        Args:
            number: of the bucket.
            p: the parameter.
            gradient: what has been received for it.
        """
        self._added.discard(p)
        coded = self._buckets[number] if self._buckets else None
        if coded is not None and p in coded.params:
            ranks = horovod().size() if self._masters is None else 1  # else only the owner has received something
            coded.put_back(p, gradient, 1 / (ranks * coded.unit))

    @property
    def _is_pending(self) -> bool:
        of_codes = (residual.is_pending for bucket in self._coded for residual in bucket.residuals)
        return bool(self._added) or any(of_codes)

    def forget_unless_kept(self, parameters: Iterable[Tensor]) -> None:
        """Drops what has been reduced since the last update, if a loop has cleared all of it.

        Args:
            parameters: the averaged ones.
        """
        if self._is_pending and not any(p.grad is not None and p.grad.any() for p in parameters):
            self.roll_back()

    def commit(self) -> None:
        """Called when an update has been made."""
        for bucket in self._coded:
            for residual in bucket.residuals:
                residual.commit()
        for p in self._added:
            del self._parked[p]
        self._waiting -= self._added
        self._added = set()

    def roll_back(self) -> None:
        """Called when no update will be made of what has been reduced since the last one."""
        for bucket in self._coded:
            for residual in bucket.residuals:
                residual.roll_back()
        self._added = set()
