"""`CheckpointManager`: checkpoints of a training loop of one's own, saved and restored by all ranks together.

    with CheckpointManager(cluster, "runs/mine", keep=3) as checkpoints:
        saved = checkpoints.restore(model=model, optimizer=optimizer, scheduler=scheduler)
        for step in range(saved["step"] if saved else 0, 1000):
            ...
            if (step + 1) % 100 == 0:
                checkpoints.save(step + 1, model=model, optimizer=optimizer, scheduler=scheduler)

`storage.load` reads a checkpoint without other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.loadable import loadable
from hvd_adam.checkpoint.random_states import random_state, restore_random_state
from hvd_adam.checkpoint.residuals import restore_residuals
from hvd_adam.checkpoint.state import require_same_tensors
from hvd_adam.checkpoint.writer import CheckpointWriter
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.averaged_adam import AveragedAdam
from hvd_adam.distributed.broadcast.tensors import broadcast_nested
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.distributed.collectives.reductions import gather
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.errors import UserError
from hvd_adam.log import logger
from hvd_adam.optim.adam import Adam
from hvd_adam.text import first_line

# Keys of a checkpoint beside the names of its parts.
_EXTRA, _RANDOM, _RESIDUALS = _OWN_KEYS = "extra", "random_states", "gradient_residuals"
_STEP = "step"  # key of what `restore` returns


class Stateful(Protocol):
    """A model, an optimizer, a scheduler, a sampler, or a loss scaler."""

    def state_dict(self) -> Any:
        """Returns the state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Restores what `state_dict` returned."""


class CheckpointManager:
    """Saves and restores a training: all that has a `state_dict`, random states, and own values.

    Rank 0 writes, in a background thread, from a copy. A checkpoint exists completely or not at all, has a
    checksum, and is loaded by plain PyTorch (see `checkpoint.storage`); the optimizer's part has the format of
    `torch.optim.Adam`, also with `strategy="sharded"`, unless its state is held in few bits: it is then saved as
    it is (`Adam.held_state_dict`). Every rank creates a manager and calls its methods, with the same arguments, in
    the same order; an error is raised on every rank. Only one job at a time may use a folder.

    As a context manager it waits at the end of the block for the last checkpoint, unless an exception ends it.

    Args:
        cluster: this process.
        folder: for the checkpoints, made when the first one is saved; used on rank 0 only. Temporary files that a
            killed job has left there are removed.
        keep: how many of the newest checkpoints to keep, in addition to the best one; at least 1.

    Raises:
        UserError: on every rank: `keep` is not a whole number of at least 1; the folder cannot be read.
    """

    def __init__(self, cluster: Cluster, folder: str | Path, *, keep: int = 3) -> None:
        self._cluster, self._folder, self._closed = cluster, Path(folder), False
        self._has_saved = False
        with raise_on_all_ranks(cluster):
            keep = _whole("keep", keep, at_least=1)
            self._writer = CheckpointWriter(self._folder if cluster.is_root else None, keep)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # other ranks may not come here
            self._closed = True
            self._writer.close()

    def save(
        self, step: int, *, extra: Mapping[str, Any] | None = None, best: bool = False, **parts: Stateful | None
    ) -> None:
        """Starts to write a checkpoint, after the previous one is written. Every rank must call it.

        Args:
            step: number of updates made so far, at least 0. A checkpoint of the same step is replaced.
            extra: own values of rank 0 by name, which `restore` returns: numbers, strings, tensors and containers
                of them. NumPy's scalars become Python's. "step" is no name of yours.
            best: whether `best` in the folder shall name this checkpoint, which is then kept.
            parts: what to save by its name, such as `model=model, optimizer=optimizer, scheduler=scheduler`. Of
                each, rank 0's `state_dict()` is saved. None is left out.

        Raises:
            UserError: on every rank: the previous checkpoint could not be written; a part has no `state_dict`, or
                its `state_dict()` has failed; the manager is closed; a value could not be loaded again by plain
                PyTorch, such as a NumPy array or an object of an own class: names its key, and the remedy.
        """
        with raise_on_all_ranks(self._cluster):
            present = _present(parts)
            step = _whole("step", step, at_least=0)
            if not isinstance(extra or {}, Mapping) or _STEP in (extra or {}):
                raise UserError(f"extra is {extra!r}; it must be a dictionary, without the key {_STEP!r}")
            if self._closed:
                raise UserError(f"save() of step {step} after close(): make another CheckpointManager")
        own = {"step": step, "parts": dict.fromkeys(present, 0), "random": random_state(self._cluster.device)}
        of_ranks = gather(self._cluster, own, "CheckpointManager.save()")
        states = {
            name: part.state_dict_on_root(held=True)
            for name, part in present.items()
            if isinstance(part, AveragedAdam)
        }
        residuals = {
            name: part.error_feedback.state_dict_on_root()
            for name, part in present.items()
            if isinstance(part, AveragedAdam) and part.error_feedback is not None
        }
        with raise_on_all_ranks(self._cluster):
            steps = {entry["step"] for entry in of_ranks}
            if len(steps) > 1:
                raise UserError(f"save() has step {min(steps)} on one rank and {max(steps)} on another")
            if self._cluster.is_root:
                random_states = [entry["random"] for entry in of_ranks]
                others = {name: _state_of(name, part) for name, part in present.items() if name not in states}
                own_values = {_EXTRA: loadable(dict(extra or {}), _EXTRA), _RANDOM: random_states}
                if residuals:
                    own_values[_RESIDUALS] = residuals
                self._warn_of_later(step)
                self._writer.save(step, {**states, **others, **own_values}, best=best)

    def _warn_of_later(self, step: int) -> None:
        """Warns, at the first checkpoint, of those of a training before that `restore` would prefer."""
        if self._has_saved:
            return
        self._has_saved = True
        later = [path.name for path in storage.newest_first(self._folder) if storage.step_of(path) > step]
        if later:
            logger.warning(
                f"{self._folder} has {later[0]}, of a later step than this one ({step}): restore() takes it if it "
                "is intact; remove the checkpoints of an earlier training, or use another folder"
            )

    def restore(self, **parts: Stateful | None) -> dict[str, Any] | None:
        """Restores the newest intact checkpoint on all ranks. Every rank must call it.

        Call it after `distribute` and right before the loop: the random generators of each rank then continue
        where they were, unless the number of ranks is another. Before `distribute` it works too, with more
        memory on ranks other than 0. Damaged checkpoints are reported and passed over.

        Args:
            parts: what to restore by its name, as in `save`; whatever else the checkpoint has is left out. None is
                left out, too.

        Returns:
            The `extra` values that were saved, and the number of updates as "step". None, and nothing is
            changed, if there is no checkpoint.

        Raises:
            UserError: on every rank: the checkpoint lacks a part, or a part does not fit; the folder cannot be
                read.
        """
        cluster = self._cluster
        with raise_on_all_ranks(cluster):
            present = _present(parts)
        gather(cluster, dict.fromkeys(present, 0), "CheckpointManager.restore()")  # the same on all ranks
        state: dict[str, Any] = {}
        folder: Path | None = None
        with raise_on_all_ranks(cluster):
            if cluster.is_root:
                folder, state = self._load_newest(present)
        # A distributed optimizer sends its state itself, each rank the part that it needs.
        of_root = {name for name, part in present.items() if isinstance(part, AveragedAdam)}
        shared = {name: value for name, value in state.items() if name not in {*of_root, _RESIDUALS}}
        if cluster.size > 1:
            folder, shared = broadcast_nested((folder, shared), "hvd_adam.restore")
        if folder is None:
            return None
        with raise_on_all_ranks(cluster):
            for name, part in present.items():
                if name not in of_root or cluster.is_root:
                    _load(name, part, (state if cluster.is_root else shared)[name], folder)
        residuals = state.get(_RESIDUALS, {})  # empty on ranks other than 0
        for name, part in present.items():
            if isinstance(part, AveragedAdam):
                part.broadcast()
                restore_residuals(part, residuals.get(name), str(folder))
        if dropped := sorted(residuals.keys() & present.keys() - of_root):
            logger.warning(
                f"checkpoint {folder} has residuals of {', '.join(dropped)}, which get lost: restore it after "
                "distribute()"
            )
        self._restore_random(shared.get(_RANDOM, []), folder)
        return {**shared.get(_EXTRA, {}), _STEP: storage.step_of(folder)}

    def wait(self) -> Path | None:
        """Waits for the checkpoint that is being written. Every rank must call it.

        Returns:
            Its folder on rank 0; None on other ranks and if none has been completed since the last call.

        Raises:
            UserError: on every rank: it could not be written.
        """
        with raise_on_all_ranks(self._cluster):
            return self._writer.result(wait=True)

    def close(self) -> None:
        """Waits for the last checkpoint and ends the background thread. Every rank must call it.

        Raises:
            UserError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._closed = True
            self._writer.close()

    def _load_newest(self, present: Mapping[str, Stateful]) -> tuple[Path | None, dict[str, Any]]:
        """Returns the newest intact checkpoint and what is asked for of it."""
        try:
            folder, state, damaged = storage.load_newest(self._folder)
        except OSError as error:
            raise UserError(f"the checkpoints in {self._folder} cannot be read: {error}") from None
        for damage in damaged:
            logger.warning(damage)
        if folder is None:
            return None, {}
        wanted = {name: state[name] for name in (*present, *_OWN_KEYS) if name in state}
        if missing := sorted(present.keys() - wanted.keys()):
            held = ", ".join(sorted(state.keys() - {*_OWN_KEYS}))
            raise UserError(
                f"checkpoint {folder} has no {', '.join(missing)}, but {held}: restore only what it has"
            )
        return folder, wanted

    def _restore_random(self, states: list[dict[str, torch.Tensor]], folder: Path) -> None:
        if len(states) == self._cluster.size:
            restore_random_state(states[self._cluster.rank], self._cluster.device)
        elif self._cluster.is_root and states:
            logger.warning(
                f"checkpoint {folder} is of {len(states)} ranks, this job has {self._cluster.size}: random "
                "generators are not restored"
            )


def _present(parts: Mapping[str, Stateful | None]) -> dict[str, Stateful]:
    """Returns the parts that are not None, in the order of their names, which is that of their collectives."""
    present = {name: part for name, part in sorted(parts.items()) if part is not None}
    for name, part in present.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            kind = f"{type(part).__module__}.{type(part).__qualname__}"
            raise UserError(f"{name} has no state_dict() (it is a {kind}): give own values in extra={{…}}")
        if isinstance(part, LocalAdam):
            raise UserError(
                f"{name} is of strategy='local', whose ranks have state of their own: save the model in "
                "outer_weights(), and what islands_on_root() returns"
            )
        if name in (_RANDOM, _RESIDUALS):
            raise UserError(f"checkpoints use the name {name} themselves: call this part something else")
    return present


def _whole(name: str, value: Any, at_least: int) -> int:
    if not isinstance(value, Integral) or int(value) < at_least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {at_least}")
    return int(value)


def _state_of(name: str, part: Any) -> Any:
    """Returns the state of a part that asks no other rank for it.

    Raises:
        UserError: its `state_dict()` has failed.
    """
    try:
        return part.held_state_dict() if isinstance(part, Adam) else part.state_dict()
    except Exception as error:  # whatever the class of the part raises
        raise UserError(f"{name}.state_dict() has failed: {first_line(error)}") from error


def _load(name: str, part: Stateful, state: Any, folder: Path) -> None:
    """Loads the state of a part.

    Raises:
        UserError: it does not fit.
    """
    if isinstance(part, torch.nn.Module):
        require_same_tensors(part.state_dict(), state, str(folder))
    try:
        part.load_state_dict(state)
    except Exception as error:  # whatever the class of the part raises
        raise UserError(f"{name} of checkpoint {folder} does not fit: {first_line(error)}") from error
