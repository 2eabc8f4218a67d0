"""`IslandAdam`: an `Adam` of one island, with the outer weights of all islands and what a checkpoint needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.broadcast.tensors import ROOT, broadcast_nested
from hvd_adam.distributed.broadcast.training import broadcast_training_state
from hvd_adam.distributed.context import collective_prefix, current_cluster, horovod
from hvd_adam.distributed.gradients.grad_scaling import GradScaling
from hvd_adam.distributed.gradients.ownership import REPLACED, RETIRED, retire_others, take_over
from hvd_adam.distributed.horovod_adapter import move_step_hooks
from hvd_adam.distributed.local.buffers import OuterBuffers
from hvd_adam.distributed.local.exchange import IslandMean
from hvd_adam.distributed.local.gradients import IslandGradients
from hvd_adam.distributed.local.islands import Islands, count_islands
from hvd_adam.distributed.local.outer import OuterWeights
from hvd_adam.distributed.model_checks import parameter_names
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.distributed.wire.codable import exact_parameters
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.error_feedback import ErrorFeedback
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam, PlainOptimizer


class IslandAdam(Adam):
    """State and outer weights of an island; the base of `LocalAdam`.

    Args:
        optimizer: the optimizer that was given to `distribute`, whose arguments the others are.

    Attributes:
        compression: "none", "int8" or "int4".
        error_feedback: None: residuals are part of `islands_on_root`.
        noise: measures nothing: no gradient is compared with a mean.
        skipped_updates: updates that islands had skipped at the last meeting, the sum over all islands.
        skipped_in_a_row: how many of the last updates up to then the island with the most had skipped.
    """

    error_feedback: ErrorFeedback | None = None
    _distributed = False  # from the end of construction on

    def __init__(
        self,
        optimizer: Adam,
        model: torch.nn.Module,
        *,
        accumulate: int,
        compression: str,
        islands: str | int | None,
        outer_lr: float,
        outer_momentum: float,
        max_grad_norm: float | None,
        loss_scaler: Any | None,
        skip_nonfinite: bool,
    ) -> None:
        cluster = current_cluster()
        self._islands = Islands.of(count_islands(islands, cluster), cluster)  # first: it may raise
        # Not Adam's constructor: parameters, state and hyper-parameters are those of the given optimizer.
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        self.state, self._inner, self._model = optimizer.state, optimizer, model
        self.compression = compression
        retire_others([p for group in self.param_groups for p in group["params"]])
        move_step_hooks(optimizer, self)
        for name in [
            name for name in vars(optimizer) if name.startswith("_optimizer_") and name.endswith("_hooks")
        ]:
            setattr(optimizer, name, type(getattr(optimizer, name))())  # its `step` may run inside this one's
        self._share()
        self.noise = NoiseMeter(None)
        self._scaling = GradScaling(max_grad_norm, loss_scaler, skip_nonfinite)
        broadcast_training_state(model, self, loss_scaler)
        self._parameters = self._ordered(model)
        coded = sum(p.numel() for p in self._parameters if self._is_coded(p))
        name = collective_prefix()
        self._outer = OuterWeights(self._parameters, outer_lr, outer_momentum)
        self._buffers = OuterBuffers(model, self._islands, name)
        self._mean = IslandMean(self._islands, compression, coded, self._parameters[0].device, name)
        self._averaging = None
        if self._islands.size > 1:
            self._averaging = IslandGradients(self._islands, self._parameters, accumulate, name)
        self._updates_in_round = 0
        self._skipped = self._in_a_row = 0  # of this island
        self.skipped_updates = self.skipped_in_a_row = 0
        self._distributed = True
        optimizer.supersede(REPLACED)
        take_over(self)

    def _ordered(self, model: torch.nn.Module) -> list[Tensor]:
        """Returns the parameters that are trained, those that are sent as codes first."""
        self._exact = exact_parameters(model)
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return sorted(trained, key=lambda p: not self._is_coded(p))

    def _is_coded(self, p: Tensor) -> bool:
        return self.compression in CODECS and p.dim() > 1 and p not in self._exact

    def _share(self) -> None:
        inner = self._inner
        inner.param_groups, inner.state, inner.defaults = self.param_groups, self.state, self.defaults

    @contextmanager
    def outer_weights(self) -> Iterator[None]:
        """Context in which the model has the outer weights and buffers, those of the last meeting.

        They are identical on all ranks: evaluate and save the model in it. Outside it, the model has this
        island's own ones.
        """
        own, buffers = self._outer.local(), self._buffers.local()
        self._outer.write()
        self._buffers.write()
        try:
            yield
        finally:
            self._outer.write(own)
            self._buffers.write(buffers)

    # Adam's methods.

    def state_dict_on_root(self, *, held: bool = False) -> dict[str, Any] | None:
        """Returns `state_dict`, or `held_state_dict`, of island 0 on rank 0 and None on the others."""
        if horovod().rank() != ROOT:
            return None
        return self.held_state_dict() if held else self.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this island's Adam, as `Adam.load_state_dict` does."""
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses parameters after `distribute`, which sends all of them in one piece.

        Raises:
            UserError: always.
        """
        if self._distributed:
            raise UserError(
                "add_param_group() cannot be used with strategy='local': add the parameters to a new Adam, and "
                "call distribute() again"
            )
        PlainOptimizer.add_param_group(self, param_group)  # the constructor of torch.optim.Optimizer

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a distributed optimizer is tied to its process; copy or save its state_dict() instead")

    def retire(self) -> None:
        """Called when another optimizer takes over its parameters: it steps no more."""
        self.supersede(RETIRED)
        self._scaling.close()

    def refuse_unfinished(self) -> None:
        """Refuses to be replaced within a round, whose updates would stay on their islands.

        Raises:
            RuntimeError: always within a round.
        """
        if self._updates_in_round:
            raise RuntimeError(
                "distribute() within a round of local steps: call meet() of the old optimizer first"
            )

    # Checkpoints.

    def islands_on_root(self) -> dict[str, Any] | None:
        """Returns what all islands need to resume, on rank 0, and None on the others. Every rank must call it.

        Rank 0 needs memory for weights and state of all islands.

        Returns:
            Plain containers and tensors: "updates_in_round"; "compression"; "momentum", the outer one, by name of
            the parameter; "skipped" and "skipped_in_a_row", as of the last meeting; "islands", for each island
            "weights" and "buffers" by name, "optimizer" (`held_state_dict`), "loss_scaler", "residuals" (see
            `IslandMean.state`), and its own "skipped" and "skipped_in_a_row".
        """
        scaler = self._scaling.loss_scaler
        own = {
            "weights": self._by_name(self._outer.local()),
            "buffers": self._buffers.local(),
            "optimizer": self.held_state_dict(),
            "loss_scaler": None if scaler is None else scaler.state_dict(),
            "residuals": self._mean.state(),
            "skipped": self._skipped,
            "skipped_in_a_row": self._in_a_row,
        }
        own = _on_cpu(own)
        islands = [own]  # rank 0's needs not be sent
        for number in range(1, self._islands.count):
            islands.append(broadcast_nested(own, f"hvd_adam.island.{number}", self._islands.leader(number)))
            if horovod().rank() != ROOT:
                islands.pop()
        if horovod().rank() != ROOT:
            return None
        return self.outer_state() | {"updates_in_round": self._updates_in_round, "islands": islands}

    def outer_state(self) -> dict[str, Any]:
        """Returns what `islands_on_root` returns, without the islands: all ranks have it after a meeting.

        With it, all islands begin a round at the outer weights, with the Adam state that was distributed.
        """
        return {
            "updates_in_round": 0,
            "compression": self.compression,
            "momentum": _on_cpu(self._by_name(self._outer.momentum)),
            "skipped": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "islands": [],
        }

    @property
    def is_in_round(self) -> bool:
        """Whether updates have been made since the last meeting."""
        return self._updates_in_round > 0

    def load_islands(self, saved: dict[str, Any] | None) -> None:
        """Resumes from what `islands_on_root` has returned. Every rank must call it, right after `distribute`.

        The model that was distributed must have had the outer weights. With as many islands as before, each one
        continues exactly where it was. With another number, all islands begin a round at the outer weights: what
        they had done in the round is dropped. Island i then gets the Adam state of saved island i mod their
        number, and an equal share of what codes have not sent yet.

        Args:
            saved: on rank 0; ignored on others. None: of a training with another strategy; nothing is loaded.
                Of `outer_state`: all islands have the Adam state that was distributed.

        Raises:
            UserError: on every rank: it does not fit the model.
        """
        rank, here, size = int(horovod().rank()), self._islands.count, int(horovod().size())
        with raise_on_all_ranks(current_cluster()):
            if rank == ROOT and saved is not None:
                self._require_fits(saved)
        islands = saved["islands"] if rank == ROOT and saved is not None else []
        shared = None
        if saved is not None and rank == ROOT:
            shared = {key: value for key, value in saved.items() if key != "islands"} | {"count": len(islands)}
            if len(islands) not in (0, here) and saved["compression"] == self.compression:
                shared["unsent"] = self._mean.unsent([island["residuals"] for island in islands])
        shared = broadcast_nested(shared, "hvd_adam.islands") if size > 1 else shared
        if shared is None:
            return
        count = shared["count"]
        for number in range(here if count else 0):
            island = islands[number % count] if rank == ROOT else None
            if number or self._islands.size > 1:
                island = broadcast_nested(island, f"hvd_adam.island.{number}")
            if number == self._islands.number and island is not None:
                self._load_island(island, exactly=count == here)
        self._outer.momentum.copy_(self._flat(shared["momentum"]))
        self.skipped_updates, self.skipped_in_a_row = shared["skipped"], shared["skipped_in_a_row"]
        self._updates_in_round = shared["updates_in_round"] if count == here else 0
        if shared["compression"] != self.compression:
            self._mean.load({})
        elif shared.get("unsent") is not None:
            self._mean.put_unsent(shared["unsent"])

    def _load_island(self, island: Mapping[str, Any], *, exactly: bool) -> None:
        """Loads an island; not `exactly`: only its Adam state and loss scale."""
        state = dict(island["optimizer"])
        state["param_groups"] = [
            {**group, "implementation": own["implementation"]}
            for group, own in zip(state["param_groups"], self.param_groups, strict=True)
        ]
        self.load_state_dict(state)
        scaler = self._scaling.loss_scaler
        if scaler is not None and island["loss_scaler"]:
            scaler.load_state_dict(island["loss_scaler"])
        if exactly:
            self._outer.write(self._flat(island["weights"]))
            self._buffers.write(island["buffers"])
            self._mean.load(island["residuals"])
            self._skipped, self._in_a_row = island["skipped"], island["skipped_in_a_row"]
        elif horovod().rank() == ROOT:
            self._skipped = 0  # the total is in `skipped_updates`

    def _require_fits(self, saved: Mapping[str, Any]) -> None:
        here = {name: tuple(value.shape) for name, value in self._by_name(self._outer.values).items()}
        there = {name: tuple(value.shape) for name, value in saved["momentum"].items()}
        for name in sorted({*here, *there}):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"the checkpoint's islands do not fit the model: {name} is {there.get(name, 'absent')} in it "
                    f"and {here.get(name, 'absent')} in the model"
                )

    def _names(self) -> Mapping[Tensor, str]:
        return parameter_names(self._model, self.param_groups)

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        names = self._names()
        pieces = torch.split(flat, [p.numel() for p in self._parameters])
        return {names[p]: piece.view_as(p) for p, piece in zip(self._parameters, pieces, strict=True)}

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        names = self._names()
        return torch.cat([values[names[p]].reshape(-1) for p in self._parameters]).to(self._outer.values)


def _on_cpu(value: Any) -> Any:
    """Returns nested containers with all tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_on_cpu, value))
    return value
