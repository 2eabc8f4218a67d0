"""Broadcasts of rank 0's training: parameters, buffers, state and hyper-parameters, bit for bit.

Unlike Horovod's `broadcast_optimizer_state`, no step is made to create missing state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.broadcast.tensors import ROOT, broadcast_tensors
from hvd_adam.distributed.context import Cluster, current_cluster, horovod
from hvd_adam.errors import UserError


def broadcast_training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Any | None = None,
    *,
    with_state: bool = True,
) -> None:
    """Copies rank 0's parameters, buffers, optimizer state, hyper-parameters and loss scale to all ranks.

    Every rank calls it.

    Args:
        model: gets rank 0's parameters, buffers, and extra state (`torch.nn.Module.get_extra_state`).
        optimizer: gets rank 0's hyper-parameters and state.
        loss_scaler: a `torch.amp.GradScaler` that gets rank 0's loss scale.
        with_state: copy the optimizer state too; otherwise each rank keeps its own.

    Raises:
        UserError: as `require_same_layout`; nothing has been changed then.
    """
    cluster = current_cluster()
    if cluster.size == 1:
        return
    require_same_layout(model, optimizer)
    roots = horovod().broadcast_object(_small_values(optimizer, loss_scaler), ROOT, name="hvd_adam.values")
    if cluster.rank != ROOT:
        _adopt_values(optimizer, loss_scaler, roots)
        if with_state:
            _adopt_state(optimizer, roots["state"])
    broadcast_tensors(_tensors(model, optimizer, with_state), "hvd_adam.broadcast")
    _broadcast_extra_state(model)


def _broadcast_extra_state(model: torch.nn.Module) -> None:
    own = [m for m in model.modules() if type(m).get_extra_state is not torch.nn.Module.get_extra_state]
    if not own:
        return
    states = horovod().broadcast_object([m.get_extra_state() for m in own], ROOT, name="hvd_adam.extra_state")
    for module, state in zip(own, states, strict=True):
        if horovod().rank() != ROOT:
            module.set_extra_state(state)


def require_same_layout(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compares this rank's model and parameter groups with rank 0's. Every rank calls it.

    Args:
        model: compared by names, order, shapes, dtypes, memory formats and `requires_grad`.
        optimizer: compared by its parameter groups.

    Raises:
        UserError: on every rank, if they differ; names the first difference.
    """
    cluster = current_cluster()
    if cluster.size == 1:
        return
    mine = _layout(model, optimizer)
    roots = horovod().broadcast_object(mine, ROOT, name="hvd_adam.layout")
    with raise_on_all_ranks(cluster):
        _compare(mine, roots)


def broadcast_hyper_parameters(optimizer: torch.optim.Optimizer, root: int) -> None:
    """Copies the hyper-parameters of one rank to all ranks. Every rank calls it."""
    hyper = horovod().broadcast_object(_hyper_parameters(optimizer), root, name="hvd_adam.hyper_parameters")
    if horovod().rank() != root:
        _adopt_hyper_parameters(optimizer, hyper)


def broadcast_buffers(model: torch.nn.Module, cluster: Cluster) -> None:
    """Copies rank 0's buffers (batch-norm statistics), which get saved, to all ranks. Every rank calls it."""
    if cluster.size > 1:
        broadcast_tensors(model.buffers(), "hvd_adam.buffers")


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, with_state: bool) -> list[torch.Tensor]:
    """Returns all tensors of the training, each once, in the same order on all ranks."""
    parameters = _optimized(optimizer)
    state = [
        value
        for parameter in (parameters if with_state else ())
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, torch.Tensor)
    ]
    everything = [*model.parameters(), *model.buffers(), *parameters, *state]
    return list({id(tensor): tensor for tensor in everything}.values())


def _layout(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns a description of what must be identical on all ranks."""

    def kind(tensor: torch.Tensor) -> str:
        # Gradients are added in memory order: channels-last on one rank only would add different elements.
        order = torch.empty_like(tensor, device="meta").stride() if tensor.requires_grad else ()
        strides = f" with strides {order}" if order != _row_major(tensor.shape) and tensor.requires_grad else ""
        return f"{tuple(tensor.shape)} {tensor.dtype}{strides}{' to train' if tensor.requires_grad else ''}"

    return {
        "model": {name: kind(t) for name, t in [*model.named_parameters(), *model.named_buffers()]},
        "groups": [[kind(p) for p in group["params"]] for group in optimizer.param_groups],
    }


def _row_major(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _compare(mine: dict[str, Any], roots: dict[str, Any]) -> None:
    for name in [*roots["model"], *mine["model"]]:
        here, there = mine["model"].get(name, "absent"), roots["model"].get(name, "absent")
        if here != there:
            raise UserError(f"the model differs from rank 0's: {name} is {here} here and {there} there")
    if list(mine["model"]) != list(roots["model"]):
        raise UserError(
            "the model's parameters are in another order than rank 0's; build the same model on all ranks"
        )
    if mine["groups"] != roots["groups"]:
        here, there = ([len(group) for group in layout["groups"]] for layout in (mine, roots))
        raise UserError(
            f"the optimizer's parameter groups differ from rank 0's: {here} parameters here and {there} there, or "
            "in another order; build the same groups on all ranks"
        )


def _small_values(optimizer: torch.optim.Optimizer, loss_scaler: Any | None) -> dict[str, Any]:
    """Returns hyper-parameters, the layout of the state, and the loss scale, to be sent as one object."""
    numbers = {parameter: number for number, parameter in enumerate(_optimized(optimizer))}
    return {
        "hyper": _hyper_parameters(optimizer),
        "state": {
            numbers[parameter]: {key: _state_layout(value) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
            if parameter in numbers  # other keys are the user's
        },
        "loss_scaler": None if loss_scaler is None else loss_scaler.state_dict(),
    }


def _hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {key: None if key == "params" else _packed(value) for key, value in group.items()}
        for group in optimizer.param_groups
    ]


def _optimized(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@dataclass(frozen=True)
class _Scalar:
    """A hyper-parameter that is a tensor, such as a learning rate that is changed in place."""

    value: float
    dtype: torch.dtype
    device_type: str

    def unpacked(self, own: object, parameters: list[torch.Tensor]) -> torch.Tensor:
        """Returns this rank's own tensor with the value if its dtype fits, so that references to it stay valid."""
        if isinstance(own, torch.Tensor) and own.dtype == self.dtype:
            return own.fill_(self.value)
        on_device = parameters and self.device_type == parameters[0].device.type
        return torch.tensor(self.value, dtype=self.dtype, device=parameters[0].device if on_device else "cpu")


def _packed(value: object) -> object:
    if isinstance(value, tuple):  # betas
        return tuple(map(_packed, value))
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return _Scalar(value.item(), value.dtype, value.device.type)
    return value


def _unpacked(value: object, own: object, parameters: list[torch.Tensor]) -> object:
    """Returns a value that `_packed` has packed; tensors are this rank's own where they fit."""
    if isinstance(value, tuple):
        owns = own if isinstance(own, tuple) and len(own) == len(value) else (None,) * len(value)
        return tuple(_unpacked(item, mine, parameters) for item, mine in zip(value, owns, strict=True))
    return value.unpacked(own, parameters) if isinstance(value, _Scalar) else value


def _state_layout(value: object) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device.type)
    return ("value", value)


def _adopt_values(optimizer: torch.optim.Optimizer, loss_scaler: Any | None, roots: dict[str, Any]) -> None:
    """Sets hyper-parameters and loss scale to rank 0's."""
    _adopt_hyper_parameters(optimizer, roots["hyper"])
    if loss_scaler is not None and roots["loss_scaler"]:
        loss_scaler.load_state_dict(roots["loss_scaler"])


def _adopt_hyper_parameters(optimizer: torch.optim.Optimizer, hypers: list[dict[str, Any]]) -> None:
    for group, hyper in zip(optimizer.param_groups, hypers, strict=True):
        own = dict(group)
        group.clear()
        for key, value in hyper.items():
            if key == "params":
                group[key] = own[key]
            else:
                group[key] = _unpacked(value, own.get(key), own["params"])


@torch.inference_mode(False)  # state that is created in that mode could not be updated outside of it
def _adopt_state(optimizer: torch.optim.Optimizer, layouts: dict[int, dict[str, tuple[Any, ...]]]) -> None:
    """Gives the state the layout and order of rank 0's, so that both have equal state dictionaries."""
    own_state = dict(optimizer.state)
    optimizer.state.clear()
    parameters = _optimized(optimizer)
    for number, layout in layouts.items():
        parameter = parameters[number]
        optimizer.state[parameter] = _adopted_state(own_state.get(parameter, {}), layout, parameter)
    mine = set(parameters)
    optimizer.state.update({key: value for key, value in own_state.items() if key not in mine})


def _adopted_state(
    state: dict[str, Any], layout: dict[str, tuple[Any, ...]], parameter: torch.Tensor
) -> dict[str, Any]:
    """Returns the state of one parameter with the given layout, keeping own tensors that fit."""
    adopted = {}
    for key, (kind, *what) in layout.items():
        if kind == "value":
            adopted[key] = what[0]
            continue
        shape, dtype, device_type = what
        mine = state.get(key)
        fits = isinstance(mine, torch.Tensor) and tuple(mine.shape) == shape and mine.dtype == dtype
        if not fits:
            device = parameter.device if device_type == parameter.device.type else torch.device(device_type)
            like_parameter = tuple(parameter.shape) == shape
            mine = (
                torch.zeros_like(parameter, dtype=dtype, device=device)
                if like_parameter
                else torch.zeros(shape, dtype=dtype, device=device)
            )
        adopted[key] = mine
    return adopted
