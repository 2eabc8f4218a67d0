"""`ErrorFeedback`: what codes miss of the gradients is saved with the training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.context import current_cluster, horovod
from hvd_adam.distributed.wire.coded_bucket import Place
from hvd_adam.distributed.wire.gradient_residuals import GradientResiduals
from hvd_adam.distributed.wire.masters import apply_masters
from hvd_adam.distributed.wire.rows import row_of_root, rows_to_root
from hvd_adam.distributed.wire.saved_residuals import SavedResiduals, as_saved
from hvd_adam.errors import UserError

_NAME = "hvd_adam.residuals"  # of the collectives that save and load


class Choice(Protocol):
    """What decides which compression is in use."""

    @property
    def is_measuring(self) -> bool:
        """Whether it has yet to decide."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where it stands; identical on all ranks."""

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continues from there, and changes the compression. None: nothing is known. Every rank must call it."""


class ErrorFeedback(GradientResiduals):
    """The residuals of an optimizer's gradients, with what saves and loads them.

    Attributes:
        choice: decides which compression is in use, and is saved, too; None if the compression is fixed.
    """

    choice: Choice | None = None

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
        return as_saved(self.compression, horovod().size(), buckets, parked, masters, self._state_of_choice())

    def total_state_dict(self) -> dict[str, Any]:
        """Returns the sum of the residuals of all ranks, as if they were of one. Every rank must call it.

        With it on every rank, nothing is lost with a rank.
        """
        names = self._names()
        own = sorted(
            (names[p], residual.cpu().contiguous()) for p, residual in self.by_parameter().items() if p in names
        )
        if horovod().size() > 1 and own:
            sums = horovod().grouped_allreduce([r for _, r in own], op=horovod().Sum, name=f"{_NAME}.total")
            own = [(name, total) for (name, _), total in zip(own, sums, strict=True)]
        masters = {} if self._masters is None else self._masters.everywhere(names)
        totals = {name: residual.unsqueeze(0) for name, residual in own}
        return as_saved(self.compression, 1, [], totals, masters, self._state_of_choice())

    def _state_of_choice(self) -> dict[str, Any] | None:
        return None if self.choice is None else self.choice.state_dict()

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
        if self._masters is not None:
            self._masters.start_over()  # else a choice without codes would write the present ones into parameters
        if self.choice is not None:
            self.choice.load_state_dict(horovod().broadcast_object(loaded.choice, 0, name=f"{_NAME}.choice"))
        with raise_on_all_ranks(current_cluster()):
            if horovod().rank() == 0:
                same = loaded.fit(self.compression, ranks, self._places(), [b.lengths for b in self._coded])
                rows = loaded.parked if same else loaded.by_name(ranks)
                rows = _known(rows, parameters)
                masters = _known(loaded.masters, parameters, "master", 0)
                shapes = {name: residual.shape[1:] for name, residual in rows.items()}
        same, shapes, held = horovod().broadcast_object((same, shapes, [*masters]), 0, name=_NAME)
        self.roll_back()
        for bucket in self._coded:
            for residual in bucket.residuals:
                residual.reset()
        if same:
            for number, bucket in enumerate(self._coded):
                both = torch.cat(loaded.buckets[number][1:], dim=1) if loaded.buckets else None
                row = row_of_root(both, f"{_NAME}.{number}")
                for residual, values in zip(bucket.residuals, torch.split(row, bucket.lengths), strict=True):
                    residual.committed.copy_(values)
                bucket.worker.changed()  # older checkpoints have residuals of what ranks now add themselves
        received = {name: row_of_root(rows.get(name), f"{_NAME}.{name}").view(shapes[name]) for name in shapes}
        self._put({p: received[name].to(p.device) for p, name in names.items() if name in received})
        if self._masters is None or not self.sends_codes:
            apply_masters(masters, held, parameters)
        else:
            self._masters.load(masters, held, parameters)

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
