"""Adam and AdamW as a ``torch.optim.Optimizer``, written from the papers' formulas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from inspect import unwrap
from typing import Any, overload

import torch
from torch import Tensor

from hvd_adam.optim import validation
from hvd_adam.optim.implementation import choose_group_implementation, choose_implementation
from hvd_adam.optim.optimizer_state import (
    Group,
    States,
    arena_for,
    complete_loaded_groups,
    copy_loaded_state,
    decoded_states,
    ensure_state,
    is_adams_state,
    saved_states,
    without_other_formats,
)
from hvd_adam.optim.parameter_store import ParameterStore
from hvd_adam.optim.plain_optimizer import PlainOptimizer

__all__ = ["Adam", "PlainOptimizer"]

Params = Iterable[Tensor] | Iterable[Group] | Iterable[tuple[str, Tensor]]


class Adam(PlainOptimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) with the interface of ``torch.optim.Adam``.

    With ``decoupled_weight_decay`` it is AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2), whose default
    in PyTorch is ``weight_decay=0.01``; with ``amsgrad`` AMSGrad (Reddi, Kale & Kumar 2018, algorithm 2). State is
    kept in each parameter's own dtype, half precision included, as in PyTorch: two tensors of the parameter's size
    (three with ``amsgrad``) and a step count. It exists from construction on for every parameter that requires a
    gradient. A step takes O(n) time for n elements. Every hyper-parameter is kept in the parameter groups, where
    it may be changed between steps. ``state_dict`` is interchangeable with those of ``torch.optim.Adam`` and
    ``AdamW``. The step count is a float32 and exact up to 2**24 steps, where every bias correction is 1.

    Args:
        params: parameters, or dictionaries of groups, or (name, parameter) pairs where PyTorch accepts them.
            Real floating point, dense, on any mixture of devices and dtypes.
        lr: learning rate α, at least 0. A 1-element tensor is read on every step; each read waits for a GPU.
        betas: decay rates of the moments in [0, 1): floats, or 1-element tensors, which are read like ``lr``.
        eps: ε, at least 0, added to the root of the second moment. In float16 the default is 0 (below 6e-8).
        weight_decay: λ, at least 0.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: shrink the parameters by lr · weight_decay instead of adding
            weight_decay · parameter to the gradient.
        maximize: ascend instead of descending.
        master_weights: True keeps a float32 copy of float16 and bfloat16 parameters (``master_param`` in the
            state), updates it, and rounds it into the parameter. "8bit" keeps 8 more bits of a bfloat16 parameter
            instead (``param_correction``), 24 bits in all; float16 parameters and small ones have a copy. Their
            moments are then float32. No effect on float32 and float64 parameters, which are their own master.
        state_format: how the moments of tensors with at least two dimensions and 4096 elements are held: "float32"
            (in the parameter's dtype, as in PyTorch), "bfloat16", rounded stochastically, or "8bit": codes with
            one scale for 32 elements, 2.13 bytes for both moments instead of 8. Put embeddings, whose rows are
            updated at different times, into a group of their own with "float32". float64 parameters keep theirs.
        stochastic_rounding: round bfloat16 parameters up or down with the probabilities that make the
            expectation exact, instead of to nearest, where small updates vanish. Their moments are then float32.
            The random bits depend only on step and position, so they are identical in a repeated run and on all
            ranks. No effect on parameters of other dtypes.
        implementation: "reference" is the paper line by line in float64, "foreach" the multi-tensor form in
            the parameters' dtype, "fused" one compiled pass over all tensors, wherever they lie, "auto" picks:
            fused on a GPU, and elsewhere from 2**20 elements or 64 tensors on. Without a compiler (C++; Triton on
            a GPU) it warns and uses foreach.
        foreach: as in PyTorch: True is ``implementation="foreach"``; False and None leave the choice to that.
        fused: as in PyTorch: True is ``implementation="fused"``; False and None leave the choice to that.
        capturable: only False: a step cannot be captured in a CUDA graph.
        differentiable: only False: a step is not recorded for gradients.

    Raises:
        ValueError: a hyper-parameter out of range, a complex, sparse or lazy parameter, an unknown implementation,
            or arguments that exclude each other.
    """

    _source: dict[str, Any] | None = None  # the state dictionary that load_state_dict is loading

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        implementation: str = "auto",
        master_weights: bool | str = False,
        state_format: str = "float32",
        stochastic_rounding: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        choices = {"foreach": foreach, "fused": fused, "capturable": capturable, "differentiable": differentiable}
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize}
        defaults |= {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        defaults["state_format"] = state_format
        defaults["implementation"] = choose_implementation(implementation, choices)
        validation.check_hyper_parameters(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters and creates their state.

        Args:
            param_group: "params" and any arguments of the constructor; missing ones have its values.

        Raises:
            ValueError: as the constructor; the optimizer is then unchanged.
        """
        choose_group_implementation(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            validation.check_hyper_parameters(group)
            validation.check_parameters(group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        self._make_missing_state(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Parameters without a gradient do not change: they are not decayed, and their step is not counted.

        Args:
            closure: recomputes the loss and its gradients.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype, or the step would be captured in
                a CUDA graph; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in the format of ``torch.optim.Adam``: moments held in few bits as float32."""
        return self._state_dict_of(self.state)

    def held_state_dict(self) -> dict[str, Any]:
        """Returns the state as it is held, with codes and scales, which `load_state_dict` loads exactly.

        ``torch.optim.Adam`` cannot load it. Without state in few bits it is `state_dict`.
        """
        return self._state_dict_of(self.state, held=True)

    def _state_dict_of(self, states: States, *, held: bool = False) -> dict[str, Any]:
        own, self.state = self.state, defaultdict(dict, states if held else decoded_states(states))
        try:
            return dict(super().state_dict())
        finally:
            self.state = own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dictionary of this class, or of ``torch.optim.Adam`` or ``AdamW``.

        The format of the moments remains this optimizer's: what has another one is converted. Whether there are
        master weights, and in which form, is one of the options that the dictionary has.

        Raises:
            ValueError: it is not Adam's or does not fit the parameters; nothing has been changed.
        """

        def remember(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            self._source = state_dict

        # Registered last, so that it runs after all hooks of the user. PyTorch casts state to each parameter's
        # dtype before it calls __setstate__, which would round float32 moments and masters of half-precision
        # parameters.
        handle = self.register_load_state_dict_pre_hook(remember)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._source = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickled optimizer, or applies the state that ``load_state_dict`` has prepared.

        A loaded state is checked before anything is changed, copied (PyTorch would share the tensors with
        their source), and completed: options that its groups lack keep this optimizer's values, and
        parameters without state get zeros. Options of other optimizers are kept but have no effect.

        Raises:
            ValueError: the loaded state is not Adam's or does not fit the parameters.
        """
        own_groups = self.__dict__.get("param_groups")
        if own_groups is None:  # unpickling or copying: the state is this class's own and complete
            super().__setstate__(state)
            for options in (self.defaults, *self.param_groups):  # of a version without it
                options.setdefault("state_format", "float32")
            return
        complete_loaded_groups(state["param_groups"], own_groups, options=self.defaults)
        for loaded, own in zip(state["param_groups"], own_groups, strict=True):
            loaded["state_format"] = own["state_format"]
        validation.check_loaded_state(state)
        exact = saved_states(self._source, self.param_groups)
        copies = {}
        for group in state["param_groups"]:
            arena = arena_for((p, group) for p in group["params"])
            for p in group["params"]:
                loaded = state["state"].get(p, {})
                if is_adams_state(loaded):
                    copied = copy_loaded_state(p, exact.get(p, loaded), group, arena)
                    copies[p] = {**without_other_formats(loaded, copied), **copied}
        had = "differentiable" in self.defaults
        super().__setstate__(state)
        self.state.update(copies)
        if not had:  # PyTorch has added it, and the groups that are saved next would have it
            self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            self._make_missing_state(group)

    @torch.inference_mode(False)  # state that is created in that mode could not be updated outside of it
    @torch.no_grad()
    def _make_missing_state(self, group: Group) -> None:
        arena = arena_for((p, group) for p in group["params"])
        for p in group["params"]:
            if p.requires_grad:
                ensure_state(self.state, p, group, arena=arena)

    @cached_property
    def _store(self) -> ParameterStore:
        """Layout and kernels; not part of the state, so that copies and unpickled optimizers build their own."""
        return ParameterStore()

    _superseded: str | None = None  # why this optimizer must not step
    state_is_sharded = False  # whether this process has a part of the state only

    def supersede(self, reason: str, *, state_is_sharded: bool = False) -> None:
        """Makes every further `step` raise a RuntimeError: another optimizer updates the parameters now.

        Args:
            reason: continues "this optimizer must not step: ".
            state_is_sharded: whether this process has a part of the state only.
        """
        self._superseded, self.state_is_sharded = reason, state_is_sharded

    def refuse_superseded(self) -> None:
        """Raises the RuntimeError that `supersede` announces."""
        if self._superseded is not None:
            raise RuntimeError(f"this optimizer must not step: {self._superseded}")

    def update_by(self, update: Callable[[], None]) -> None:
        """Makes `step`, which a derived class may extend, call `update` instead of updating by itself."""
        self.__dict__["_update"] = update

    @property
    def steps_plainly(self) -> bool:
        """Whether `step` is the one of `Adam`, and not of a derived class that extends it."""
        own: Any = type(self).step  # PyTorch wraps it
        return unwrap(own) is unwrap(Adam.step)

    def _update(self) -> None:
        """Takes one step with the gradients as they are."""
        self.refuse_superseded()
        self._store.ensure_layout(self.param_groups, self.state)
        self._store.update(self.param_groups, self.state)
