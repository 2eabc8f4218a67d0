"""`AveragedAdam`: state, layout and hyper-parameters of an `Adam` that belongs to all ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.automatic.candidates import first_of, is_automatic, is_lossless, may_send_codes
from hvd_adam.distributed.automatic.choice import AutomaticCompression
from hvd_adam.distributed.averaged_step import AveragedStep
from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.broadcast.training import broadcast_training_state
from hvd_adam.distributed.context import collective_prefix, horovod
from hvd_adam.distributed.gradients import ownership
from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.gradients.backward_pass import Callbacks
from hvd_adam.distributed.gradients.grad_scaling import GradScaling
from hvd_adam.distributed.gradients.lockstep import LOADED, STEPS, UPDATES, Lockstep, facts_of_groups
from hvd_adam.distributed.gradients.same_batches import SameBatches
from hvd_adam.distributed.horovod_adapter import HorovodAdapter, move_step_hooks
from hvd_adam.distributed.join import REDUCE, Join, refuse_in_join
from hvd_adam.distributed.layout import DistributedLayout
from hvd_adam.distributed.model_checks import (
    in_order,
    parameter_names,
    parameter_of,
    refuse_own_gradients,
    require_unchanged_by_forward,
)
from hvd_adam.distributed.noise.meter import meter_of
from hvd_adam.distributed.strategies.coded_zero import strategy_of
from hvd_adam.distributed.wire.codable import exact_parameters
from hvd_adam.distributed.wire.error_feedback import ErrorFeedback
from hvd_adam.optim.adam import Adam, PlainOptimizer
from hvd_adam.optim.optimizer_state import States, copy_of_states
from hvd_adam.optim.plain_optimizer import outside_inference_mode

# What changes the layout, for an error.
_NEW_LAYOUT = "a change of parameters or options (freezing, a dtype, amsgrad)"


class AveragedAdam(Adam):
    """An `Adam` with state that is the same on all ranks, or sharded over them; the base of `DistributedAdam`.

    Args:
        optimizer: the optimizer that was given to `distribute`, whose arguments the others are.

    Attributes:
        error_feedback: the residuals of `compression="int8"` and `"int4"`, and what `"auto"` has chosen; None with
            other compressions.
        noise: measures the noise scale, with `noise_scale`.
    """

    averager_class: type[GradientAverager] = GradientAverager
    layout_class: type[DistributedLayout] = DistributedLayout
    error_feedback: ErrorFeedback | None = None
    _automatic: AutomaticCompression | None = None
    _adapter: HorovodAdapter | None = None  # from the end of construction on

    def __init__(
        self,
        optimizer: Adam,
        model: torch.nn.Module,
        *,
        strategy: str,
        accumulate: int,
        compression: str,
        bucket_mib: float,
        op: str,
        max_grad_norm: float | None,
        loss_scaler: Any | None,
        skip_nonfinite: bool,
        defer_averaging: bool,
        noise_scale: int | None,
        noise_scale_form: str,
    ) -> None:
        # Not Adam's constructor: parameters, state and hyper-parameters are those of the given optimizer.
        torch.optim.Optimizer.__init__(self, optimizer.param_groups, optimizer.defaults)
        self.state = optimizer.state
        self._model, self._accumulate = model, accumulate
        self._rank, self._ranks = int(horovod().rank()), int(horovod().size())
        self._adasum = op == "adasum" and self._ranks > 1
        retired = ownership.retire_others(self._parameters())
        move_step_hooks(optimizer, self)
        prefix = collective_prefix()  # of the names of its collectives
        sharded = strategy == "sharded" and self._ranks > 1  # on one rank, the shard is the whole state
        first, codes = first_of(compression), may_send_codes(compression)
        self._strategy = strategy_of(prefix, self._parameters()[0].device if sharded else None, first, codes)
        self._scaling = GradScaling(max_grad_norm, loss_scaler, skip_nonfinite)
        if codes or first != compression:
            exact, unit = partial(exact_parameters, model), self._scaling.current_scale
            self.error_feedback = ErrorFeedback(
                first, self._names, exact, unit, retired, self._strategy.masters, switches=first != compression
            )
        self._same_batches = SameBatches(model, self._parameters, rank=self._rank, ranks=self._ranks)
        self._lockstep = Lockstep(self._rank, self._ranks, self._same_batches)
        self._averager = self.averager_class(
            Callbacks(
                parameters=self._parameters,
                names=self._names,
                ensure_layout=self._ensure_layout,
                facts=self._facts,
                averaging_begins=self._averaging_begins,
                backward_ended=self._backward_ended,
            ),
            self._lockstep,
            accumulate=accumulate,
            deferred=defer_averaging,
            add=self._scaling.needs_sum,
            watch=loss_scaler is not None,
        )
        self.noise = meter_of(self, noise_scale, noise_scale_form, accumulate, self._strategy.shard)
        self._averager.noise = self.noise
        self._layout = self.layout_class(
            self._strategy,
            self._averager,
            self._lockstep,
            compression=first,
            bucket_bytes=int(bucket_mib * 2**20),
            accumulate=accumulate,
            adasum=self._adasum,
            feedback=self.error_feedback,
            lossless=is_lossless(compression),
            ahead=defer_averaging and not self._scaling.needs_norm,
        )
        self._store = self._layout.store
        self._step = AveragedStep(
            self, self._parameters, self._averager, self._scaling, self._strategy, self._layout
        )
        self._join: Join | None = None
        self._updates = self._loads = 0
        self._replaced: States = {}  # the state before the one that has been loaded, until that is broadcast
        self._looked_for_others = False  # among the gradients of a backward pass
        # GradScaler.step unscales gradients, unless an optimizer has this attribute: then step() refuses it.
        follows_passes = accumulate > 1 or loss_scaler is not None
        if follows_passes or defer_averaging or codes or self._strategy.scatters or self._adasum:
            self._step_supports_amp_scaling = True
        broadcast_training_state(model, self, loss_scaler)
        self._ensure_layout()
        self._adapter = self._layout.connect(optimizer, self._names(), follows_passes=follows_passes)
        self._adapter.share(self)
        if is_automatic(compression) and self.error_feedback is not None:
            self._automatic = AutomaticCompression(compression, self._layout, self._averager, prefix)
            self.error_feedback.choice = self._automatic
        if self._adasum:  # Horovod has set zero gradients, with which unused parameters would be updated
            PlainOptimizer.zero_grad(self)
        optimizer.supersede(ownership.REPLACED, state_is_sharded=sharded)
        ownership.take_over(self)

    # State.

    @outside_inference_mode
    def broadcast(self) -> None:
        """Copies rank 0's parameters, buffers, state and hyper-parameters to all ranks. Every rank must call it.

        `distribute` has done so. Call it after `load_state_dict` on rank 0 only. If the state is sharded, each
        rank keeps its shard of it.
        """
        self._broadcast("broadcast()")

    def _broadcast(self, call: str) -> None:
        self._averager.start_meeting(call)()
        self._step.skips.record()
        put_back = partial(self.state.update, self._replaced)
        with_state = self._strategy.state_is_broadcast(self._replace_state, put_back)
        broadcast_training_state(self._model, self, self._scaling.loss_scaler, with_state=with_state)
        self._loads = 0
        self._ensure_layout()

    def _replace_state(self) -> None:
        self.state.clear()
        for group in self.param_groups:
            self._make_missing_state(group)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of `torch.optim.Adam`. If it is sharded, every rank must call it."""
        return self._state_dict_of(self._whole_state("state_dict()"))

    def held_state_dict(self) -> dict[str, Any]:
        """Returns the state as it is held. If it is sharded, every rank must call it."""
        return self._state_dict_of(self._whole_state("held_state_dict()"), held=True)

    def state_dict_on_root(self, *, held: bool = False) -> dict[str, Any] | None:
        """Returns `state_dict`, or `held_state_dict`, on rank 0 and None on the others.

        Every rank must call it if the state is sharded; it is then in host memory.
        """
        whole = self._whole_state("state_dict_on_root()", on_root_only=True)
        return self._state_dict_of(whole, held=held) if self._rank == ROOT else None

    @outside_inference_mode
    def _whole_state(self, call: str, *, on_root_only: bool = False) -> States:
        if self._strategy.exchanges:
            self._averager.start_meeting(call)()
        self._step.skips.record()
        return self._strategy.whole_state(self.state, self._layout.buffers, on_root_only=on_root_only)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a whole state, as `Adam.load_state_dict` does: call it on every rank, or `broadcast` afterwards.

        Args:
            state_dict: of this class, of `Adam`, or of `torch.optim.Adam` or `AdamW`.

        Raises:
            RuntimeError: called after `backward` and before `step`, while reductions are in flight.
            ValueError: it does not fit the parameters; nothing has been changed then.
        """
        self._refuse_in_flight("load_state_dict() between backward() and step() would mix two states")
        self._step.skips.record()  # belongs to the state that is replaced
        if self._strategy.exchanges and not self._strategy.loaded:
            self._replaced = copy_of_states(self.state)
        super().load_state_dict(state_dict)
        self._horovod.share(self)
        self._loads += 1
        self._strategy.loaded = True

    @outside_inference_mode
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters to train, with rank 0's values and options on every rank. Every rank must call it.

        Args:
            param_group: as `torch.optim.Optimizer.add_param_group` takes it.

        Raises:
            UserError: the group differs from rank 0's.
            RuntimeError: called after `backward` and before `step`, while reductions are in flight, or with
                parameters that have gradients.
            ValueError: as `Adam` raises it.
        """
        if self._adapter is None:  # the constructor of torch.optim.Optimizer: the state exists already
            PlainOptimizer.add_param_group(self, param_group)
            return
        self._refuse_in_flight("add_param_group() between backward() and step() would change what is in flight")
        added = param_group["params"] = in_order(param_group["params"])
        if self._averager.averaged:
            refuse_own_gradients(added)
        if self._ranks > 1:
            require_unchanged_by_forward(self._model, map(parameter_of, added))
        super().add_param_group(param_group)
        self._horovod.share(self)
        self._broadcast("add_param_group()")
        self._layout.add_hooks(self._parameters(), self._names())

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a distributed optimizer is tied to its process; copy or save its state_dict() instead")

    def retire(self) -> None:
        """Called when another optimizer takes over its parameters: it reduces nothing and steps no more."""
        self.supersede(ownership.RETIRED)
        self._horovod.retire()
        self._scaling.close()
        self._same_batches.close()

    def refuse_unfinished(self) -> None:
        """Raises a RuntimeError if this rank has gradients that are not yet the mean, or of its shard only."""
        if self._averager.in_flight or (self._averager.averaged and self._strategy.scatters):
            raise RuntimeError(
                "distribute() between backward() and step() of the optimizer that it replaces would lose averaged "
                "gradients; call it before backward() or after step()"
            )

    # Layout, names and facts.

    @property
    def _horovod(self) -> HorovodAdapter:
        assert self._adapter is not None  # the constructor has ended
        return self._adapter

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> dict[Tensor, str]:
        return parameter_names(self._model, self.param_groups)

    def _ensure_layout(self) -> None:
        """Builds the layout unless it fits parameters and state. Nothing may be in flight."""
        if not self._layout.fits(self.param_groups, self.state):
            self._step.skips.record()  # while the layout is that of the last step
            if self._layout.buffers and self._strategy.shard[1] > 1:
                self.state.update(self._whole_state(_NEW_LAYOUT))
            else:  # the other ranks need a new layout, too: if not, they must not wait for this one for ever
                self._averager.start_meeting(_NEW_LAYOUT)()
            self._layout.build(self.param_groups, self.state, self._names())
        self._strategy.loaded, self._replaced = False, {}

    def _facts(self) -> dict[str, object]:
        states = filter(None, map(self.state.get, self._parameters()))  # other keys are the user's
        steps = 0.0 if self._adasum else sum(float(state.get("step", 0.0)) for state in states)  # Adasum: own
        return {UPDATES: self._updates, LOADED: self._loads, STEPS: steps} | facts_of_groups(self.param_groups)

    def _backward_ended(self) -> None:
        self._scaling.remember_scale()
        if not self._looked_for_others and self._ranks > 1:
            self._looked_for_others = True
            if self._rank == ROOT:
                ownership.warn_of_unaveraged(self._model)

    def _averaging_begins(self) -> None:
        self._store.check_options(self.param_groups)
        if self._join is not None:
            self._join.announce(REDUCE)
            self._layout.divide_by(self._join.divisor)
        else:
            refuse_in_join()

    def _in_flight(self) -> bool:
        return self._averager.in_flight or (self._adasum and self._horovod.in_flight)

    def _refuse_in_flight(self, problem: str) -> None:
        self._averager.leave_aborted_pass()
        if self._in_flight():
            remedy = "call it before backward() or after step(), or distribute() without"
            raise RuntimeError(f"{problem}; {remedy} {'adasum' if self._adasum else self._averager.option}")

    def _refuse_adasum(self) -> None:
        if self._adasum:
            raise RuntimeError("adasum combines updates, not gradients: there is no averaged gradient")
