"""`ErrorFeedback`: what codes miss of the gradients is added to those of the next update.

Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847. The residuals are in units of the mean gradient,
without the loss scale. Their sum over the ranks is what updates have not received yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.context import current_cluster, horovod
from hvd_adam.distributed.gradients.bucket_layout import ALIGNMENT
from hvd_adam.distributed.gradients.compression import AllReduce, Reduction, Scaling
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codable import require_codable
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.coded_allreduce import CodedAllReduce, CodedReduceScatter, exact_name
from hvd_adam.distributed.wire.coded_bucket import CodedBucket, Place, view
from hvd_adam.distributed.wire.masters import Masters, apply_masters
from hvd_adam.distributed.wire.rows import row_of_root, rows_to_root
from hvd_adam.distributed.wire.saved_residuals import SavedResiduals, as_saved
from hvd_adam.errors import UserError

Residuals = dict[Tensor, Tensor]  # by parameter, with its shape

_NAME = "hvd_adam.residuals"  # of the collectives that save and load


class HasErrorFeedback(Protocol):
    """An optimizer."""

    error_feedback: ErrorFeedback | None


class ErrorFeedback:
    """The residuals of an optimizer's gradients: they follow the parameters through every change of buckets.

    Residuals change when an update is made, and on all ranks or on none: not by gradients that are not finite, nor
    by gradients that are cleared without an update.

    Args:
        compression: "int8" or "int4".
        names: returns a name for every parameter, identical on all ranks.
        exact: returns the parameters whose gradients are sent exactly; see `exact_parameters`.
        unit: returns the loss scale.
        retired: optimizers that had some of the parameters until now; their residuals are taken over.
        masters: of the parameters, if each rank gets the gradients of its own shard only; else None.

    Attributes:
        compression: as the argument.
        shard_multiple: the length of a shard of a bucket must be a multiple of it.
    """

    def __init__(
        self,
        compression: str,
        names: Callable[[], Mapping[Tensor, str]],
        exact: Callable[[], set[Tensor]],
        unit: Callable[[], float],
        retired: Iterable[HasErrorFeedback] = (),
        masters: Masters | None = None,
    ) -> None:
        self.compression, self._codec = compression, CODECS[compression]
        self._names, self._exact, self._unit, self._masters = names, exact, unit, masters
        self.shard_multiple = ALIGNMENT if masters is None else self._codec.block
        self._buckets: list[CodedBucket | None] = []
        self._round_unit: float | None = None  # the loss scale of the round in flight
        own, before = names(), filter(None, (optimizer.error_feedback for optimizer in retired))
        found = [item for feedback in before for item in feedback.by_parameter().items()]
        # Of parameters that are in no bucket, such as frozen ones.
        self._parked: Residuals = {p: residual for p, residual in found if p in own}

    @property
    def _coded(self) -> list[CodedBucket]:
        return [bucket for bucket in self._buckets if bucket is not None]

    # Layout.

    def arrange(self, buffers: Sequence[GradientBuffer]) -> None:
        """Moves the residuals to the places that their parameters have in new buckets.

        Args:
            buffers: of the gradients.
        """
        for buffer in buffers:
            require_codable(buffer.dtype, self.compression)
        committed, latest = self.by_parameter(), self.by_parameter(latest=True)
        pending = self._is_pending
        exact = self._exact()
        rank, ranks = horovod().rank(), horovod().size()
        self._buckets = []
        scatter = self._masters is not None
        divided = []
        for buffer in buffers:
            for bucket in buffer.layout.buckets:
                params = buffer.params[bucket.first : bucket.last]
                kept = exact.union(p for p in params if p.dim() < 2)
                coded = None
                if not kept.issuperset(params):
                    coded = CodedBucket(self._codec, buffer, bucket, kept, rank, ranks, scatter=scatter)
                self._buckets.append(coded)
                divided.append((buffer, bucket, {} if coded is None else coded.params))
        if self._masters is not None:
            self._masters.arrange(divided)
        self._put(committed)
        if pending:
            for coded in self._coded:
                coded.put(latest, pending=True)

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

    # Reductions.

    def start(self, number: int, gradients: Tensor, name: str, scaling: Scaling) -> Reduction:
        """Starts to add a bucket over all ranks; the arguments are those of `CodedAllReduce`."""
        coded = self._buckets[number]
        if coded is None:
            return AllReduce(gradients, exact_name(name), "none", scaling=scaling)
        if self._round_unit is None:
            self._round_unit = self._unit()  # once a round: a GPU is waited for
        coded.unit = self._round_unit
        kind = CodedAllReduce if self._masters is None else CodedReduceScatter
        return kind(gradients, name, coded, scaling)

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
        coded = self._buckets[number]
        if coded is not None and p in coded.params:
            residual = view(coded.worker.latest, coded.params[p])
            ranks = horovod().size() if self._masters is None else 1  # else only the owner has received something
            residual.add_(gradient, alpha=1 / (ranks * coded.unit))

    @property
    def _is_pending(self) -> bool:
        return any(residual.is_pending for bucket in self._coded for residual in bucket.residuals)

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

    def roll_back(self) -> None:
        """Called when no update will be made of what has been reduced since the last one."""
        for bucket in self._coded:
            for residual in bucket.residuals:
                residual.roll_back()

    # Saving.

    def state_dict_on_root(self) -> dict[str, Any] | None:
        """Returns the residuals of all ranks on rank 0, and None on the others. Every rank must call it.

        Returns:
            Plain containers and float32 tensors on the CPU; see `as_saved`.
        """
        buckets = []
        for number, (places, bucket) in enumerate(zip(self._places(), self._coded, strict=True)):
            own = torch.cat([residual.committed for residual in bucket.residuals])
            rows = rows_to_root(own, f"{_NAME}.{number}")
            if rows is not None:
                worker, server = torch.split(rows, bucket.lengths, dim=1)
                buckets.append((places, worker.contiguous(), server.contiguous()))
        parked = {}
        for name, residual in self._parked_by_name().items():
            rows = rows_to_root(residual.reshape(-1), f"{_NAME}.{name}")
            if rows is not None:
                parked[name] = rows.view(len(rows), *residual.shape)
        masters = {} if self._masters is None else self._masters.on_root(self._names())
        if horovod().rank() != 0:
            return None
        return as_saved(self.compression, horovod().size(), buckets, parked, masters)

    def total_state_dict(self) -> dict[str, Any]:
        """Returns the sum of the residuals of all ranks, as if they were of one. Every rank must call it.

        With it on every rank, nothing is lost with a rank.
        """
        names = self._names()
        own = sorted(
            (names[p], residual.cpu().contiguous()) for p, residual in self.by_parameter().items() if p in names
        )
        if horovod().size() > 1 and own:
            totals = horovod().grouped_allreduce([r for _, r in own], op=horovod().Sum, name=f"{_NAME}.total")
            own = [(name, total) for (name, _), total in zip(own, totals, strict=True)]
        masters = {} if self._masters is None else self._masters.everywhere(names)
        return as_saved(self.compression, 1, [], {name: residual.unsqueeze(0) for name, residual in own}, masters)

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Replaces the residuals by those of a checkpoint. Every rank must call it, and while none is in flight.

        Args:
            saved: on rank 0, what `state_dict_on_root` or `total_state_dict` has returned; ignored on others. None
                makes all residuals 0.

        Raises:
            UserError: on every rank: it is something else, or a parameter has another shape.
        """
        ranks, names = horovod().size(), self._names()
        parameters = {name: p for p, name in names.items()}
        loaded, rows, shapes, same = SavedResiduals(None), dict[str, Tensor](), dict[str, Any](), False
        masters: dict[str, Tensor] = {}
        with raise_on_all_ranks(current_cluster()):
            if horovod().rank() == 0:
                loaded = SavedResiduals(saved)
                same = loaded.fit(self.compression, ranks, self._places(), [b.lengths for b in self._coded])
                rows = loaded.parked if same else loaded.by_name(ranks)
                rows = _known(rows, parameters)
                masters = _known(loaded.masters, parameters, "master", 0)
                shapes = {name: residual.shape[1:] for name, residual in rows.items()}
        same, shapes, held = horovod().broadcast_object((same, shapes, [*masters]), 0, name=_NAME)
        for bucket in self._coded:
            for residual in bucket.residuals:
                residual.reset()
        if same:
            for number, bucket in enumerate(self._coded):
                both = torch.cat(loaded.buckets[number][1:], dim=1) if loaded.buckets else None
                row = row_of_root(both, f"{_NAME}.{number}")
                for residual, values in zip(bucket.residuals, torch.split(row, bucket.lengths), strict=True):
                    residual.committed.copy_(values)
        received = {name: row_of_root(rows.get(name), f"{_NAME}.{name}").view(shapes[name]) for name in shapes}
        self._put({p: received[name].to(p.device) for p, name in names.items() if name in received})
        (apply_masters if self._masters is None else self._masters.load)(masters, held, parameters)

    def _places(self) -> list[dict[str, Place]]:
        """Returns the places of the parameters in each bucket, by name."""
        names = self._names()
        return [{names[p]: place for p, place in bucket.params.items()} for bucket in self._coded]

    def _parked_by_name(self) -> dict[str, Tensor]:
        names = self._names()
        return {names[p]: residual for p, residual in self._parked.items() if p in names}


def _known(
    saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str = "residual", first: int = 1
) -> dict[str, Tensor]:
    """Returns the saved tensors of parameters that this optimizer has, whose shapes begin at dimension `first`."""
    for name, value in saved.items():
        if name not in parameters:
            warnings.warn(
                f"hvd_adam: the {what} of {name} is dropped: this optimizer has no such parameter",
                RuntimeWarning,
                stacklevel=2,
            )
        elif value.shape[first:] != parameters[name].shape:
            shapes = f"{tuple(value.shape[first:])}, the parameter {tuple(parameters[name].shape)}"
            raise UserError(f"the {what} of {name} has the shape {shapes}")
    return {name: value for name, value in saved.items() if name in parameters}
