"""Makes every rank's tensors and hyper-parameters rank 0's, bit for bit, and leaves rank 0's as they are.

Tensors travel as bytes: what Horovod's types cannot express (bfloat16, NaN payloads, complex buffers)
arrives unchanged. Unlike Horovod's `broadcast_optimizer_state`, nothing is invented on the way: no step is
taken to bring state into being.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hvd_adam.cluster import Cluster, horovod, init, together
from hvd_adam.errors import UserError

ROOT = 0
CHUNK_BYTES = 64 * 2**20  # small tensors are packed into chunks of this size; larger ones travel by themselves


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], name: str) -> None:
    """Overwrites the tensors, of any dtype, layout and device, with rank 0's. Shapes and dtypes must agree."""
    for number, chunk in enumerate(_chunks(tensors)):
        packed = torch.cat([_to_bytes(tensor) for tensor in chunk])
        horovod().broadcast_(packed, root_rank=ROOT, name=f"{name}.{number}")
        if horovod().rank() == ROOT:
            continue
        sizes = [tensor.numel() * tensor.element_size() for tensor in chunk]
        for tensor, received in zip(chunk, packed.split(sizes), strict=True):
            tensor.copy_(_from_bytes(received, tensor))


def broadcast_training(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_scaler: Any | None = None
) -> None:
    """Gives every rank the parameters, buffers, optimizer state and hyper-parameters (and loss scale) of rank 0.

    Raises:
        UserError: on every rank, if a rank's model or parameter groups differ from rank 0's in names, number,
            shapes or dtypes; names the first difference. Nothing has been changed then.
    """
    cluster = init()
    if cluster.size == 1:
        return
    mine = _describe(model, optimizer, loss_scaler)
    roots = horovod().broadcast_object(mine, root_rank=ROOT, name="hvd_adam.layout")
    with together(cluster):
        _require_layout(mine, roots)
    if cluster.rank != ROOT:
        _adopt(optimizer, loss_scaler, roots)
    broadcast_tensors(_tensors(model, optimizer), "hvd_adam.broadcast")


def broadcast_buffers(model: torch.nn.Module, cluster: Cluster) -> None:
    """Gives every rank the buffers (batch-norm statistics) of rank 0, which are the ones that get saved."""
    if cluster.size > 1:
        broadcast_tensors(model.buffers(), "hvd_adam.buffers")


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups neighbours on one device into chunks of at most CHUNK_BYTES, or of one larger tensor."""
    chunk: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if chunk and (filled + size > CHUNK_BYTES or tensor.device != chunk[0].device):
            yield chunk
            chunk, filled = [], 0
        if size:
            chunk.append(tensor)
            filled += size
    if chunk:
        yield chunk


def _to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(received: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # A slice of the packed chunk need not be aligned for a wider type: the clone is.
    return received.clone().view(like.dtype).view(like.shape)


def _tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors of the training, each once, in an order that all ranks share."""
    parameters = _trained(optimizer)
    state = [
        value
        for parameter in parameters
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, torch.Tensor)
    ]
    everything = [*model.parameters(), *model.buffers(), *parameters, *state]
    return list({id(tensor): tensor for tensor in everything}.values())


def _describe(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_scaler: Any | None) -> dict:
    """The layout that must agree (model, groups) and the small values that are rank 0's to give."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    groups = optimizer.param_groups
    numbers = {parameter: number for number, parameter in enumerate(_trained(optimizer))}
    return {
        "model": {name: (tuple(t.shape), str(t.dtype)) for name, t in tensors},
        "groups": [[(tuple(p.shape), str(p.dtype)) for p in group["params"]] for group in groups],
        "hyper": [
            {key: None if key == "params" else _plain(value) for key, value in group.items()} for group in groups
        ],
        "state": {
            numbers[parameter]: {key: _state_layout(value) for key, value in state.items()}
            for parameter, state in optimizer.state.items()
        },
        "loss_scaler": None if loss_scaler is None else loss_scaler.state_dict(),
    }


def _trained(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _plain(value: object) -> object:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _state_layout(value: object) -> tuple:
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype, value.device.type)
    return ("value", value)


def _require_layout(mine: dict, roots: dict) -> None:
    for name in sorted({*mine["model"], *roots["model"]}):
        here, there = mine["model"].get(name, "absent"), roots["model"].get(name, "absent")
        if here != there:
            raise UserError(f"the model differs from rank 0's: {name} is {here} here and {there} there")
    if mine["groups"] != roots["groups"]:
        sizes = [[len(group) for group in layout["groups"]] for layout in (mine, roots)]
        raise UserError(
            f"the optimizer's parameter groups differ from rank 0's: {sizes[0]} parameters here, {sizes[1]} "
            "there, or in another order; build them alike on all ranks"
        )


def _adopt(optimizer: torch.optim.Optimizer, loss_scaler: Any | None, roots: dict) -> None:
    """Takes over rank 0's hyper-parameters and makes room for its state, in its order, so that hashes agree."""
    for group, hyper in zip(optimizer.param_groups, roots["hyper"], strict=True):
        own = dict(group)
        group.clear()
        for key, value in hyper.items():
            if key == "params":
                group[key] = own[key]
            elif isinstance(own.get(key), torch.Tensor):
                group[key] = own[key].fill_(value)
            else:
                group[key] = value
    own_state = dict(optimizer.state)
    optimizer.state.clear()
    parameters = _trained(optimizer)
    for number, layout in roots["state"].items():
        parameter = parameters[number]
        optimizer.state[parameter] = _adopted_state(own_state.get(parameter, {}), layout, parameter)
    if loss_scaler is not None and roots["loss_scaler"]:
        loss_scaler.load_state_dict(roots["loss_scaler"])


def _adopted_state(state: dict, layout: dict, parameter: torch.Tensor) -> dict:
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
