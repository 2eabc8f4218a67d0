"""The update of lists of tensors in PyTorch's own operations: one tensor at a time, or all tensors together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_adam.optim.expression import current_master
from hvd_adam.optim.formats.random_bits import round_stochastically, rounding_seed
from hvd_adam.optim.memory import memory_order
from hvd_adam.optim.optimizer_state import Group
from hvd_adam.optim.reference import adam_update
from hvd_adam.optim.tensor_lists import TensorLists


def update_reference(lists: TensorLists, group: Group, grad_scale: Tensor | None) -> None:
    """Takes one step by `reference.adam_update`, in float64, one tensor at a time.

    Args:
        lists: what to update, in place.
        group: the hyper-parameters.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1.
    """
    beta1, beta2 = map(float, group["betas"])
    thetas = _thetas(lists, group, torch.float64)
    maxima: Sequence[Tensor | None] = lists.max_exp_avg_sqs or [None] * len(lists.params)
    columns = (thetas, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, maxima, lists.steps)
    for theta, g, m, v, v_max, step in zip(*columns, strict=True):
        adam_update(
            theta,
            g if grad_scale is None else g.double() * grad_scale.double(),
            m,
            v,
            v_max,
            t=step,
            alpha=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            epsilon=float(group["eps"]),
            lambda_=float(group["weight_decay"]),
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
    _store(lists, group, thetas)


def update_foreach(lists: TensorLists, group: Group, grad_scale: Tensor | None) -> None:
    """Takes one step for all tensors together, in their own dtype.

    The order of operations is that of the plain formulas in PyTorch, so that results agree with
    ``torch.optim.Adam`` to the last bit wherever the same kernels run. Temporaries: one copy of the
    parameters for the denominator, one each for ``grad_scale``, ``maximize``, coupled weight decay
    and half-precision parameters with float32 moments.

    Args:
        lists: what to update, in place.
        group: the hyper-parameters.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1.
    """
    lr, weight_decay, eps = (float(group[name]) for name in ("lr", "weight_decay", "eps"))
    beta1, beta2 = map(float, group["betas"])
    thetas = _thetas(lists, group, torch.float32)
    dtype = lists.exp_avgs[0].dtype
    grads: list[Tensor] | tuple[Tensor, ...] = lists.grads
    if grads[0].dtype != dtype:
        grads = [g.to(dtype) for g in grads]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale.to(grads[0].dtype))
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    if weight_decay != 0:
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(thetas, 1 - lr * weight_decay)
        else:
            grads = torch._foreach_add(grads, thetas, alpha=weight_decay)

    torch._foreach_lerp_(lists.exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(lists.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(lists.exp_avg_sqs, grads, grads, 1 - beta2)
    second_moments = lists.exp_avg_sqs
    if group["amsgrad"]:
        torch._foreach_maximum_(lists.max_exp_avg_sqs, lists.exp_avg_sqs)
        second_moments = lists.max_exp_avg_sqs

    denominators = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in lists.steps])
    torch._foreach_add_(denominators, eps)
    step_sizes = [-(lr / (1 - beta1**t)) for t in lists.steps]
    torch._foreach_addcdiv_(thetas, lists.exp_avgs, denominators, step_sizes)
    _store(lists, group, thetas)


def update_lists(name: str, lists: TensorLists, group: Group, grad_scale: Tensor | None) -> None:
    """Takes one step by an implementation, in float32 copies of a state that is held in few bits.

    Args:
        name: "reference" or "foreach".
        lists: what to update, in place.
        group: the hyper-parameters.
        grad_scale: multiplies the gradients; 0-dimensional; None for 1.
    """
    lists.decode()
    UPDATES[name](lists, group, grad_scale)
    lists.encode()


UPDATES: dict[str, Callable[[TensorLists, Group, Tensor | None], None]] = {
    "reference": update_reference,
    "foreach": update_foreach,
}


def _thetas(lists: TensorLists, group: Group, dtype: torch.dtype) -> list[Tensor]:
    """Returns the tensors to update: the parameters, their masters, or copies in `dtype`."""
    if lists.rounding == "stochastic" or (lists.in_few_bits and not lists.masters):
        return [p.to(dtype) for p in lists.params]
    if lists.rounding == "correction":
        return lists.masters
    for p, master in zip(lists.params if lists.masters else (), lists.masters, strict=True):
        master.copy_(current_master(p, master))
    return lists.masters or lists.params


def _store(lists: TensorLists, group: Group, thetas: list[Tensor]) -> None:
    """Rounds the updated tensors into the parameters, unless they are the parameters themselves."""
    if lists.rounding == "stochastic":
        for p, theta, step, position in zip(lists.params, thetas, lists.steps, lists.positions, strict=True):
            seed = torch.tensor(rounding_seed(int(step), position), dtype=torch.int64, device="cpu")
            placed = torch.empty_like(p, dtype=torch.float32).copy_(theta)  # bits follow the order of memory
            rounded = round_stochastically(memory_order(placed, 0, p.numel()), seed)
            p.copy_(rounded.as_strided(p.shape, placed.stride()))
    elif lists.rounding == "nearest" and lists.in_few_bits:
        for p, theta in zip(lists.params, thetas, strict=True):
            p.copy_(theta)
    elif lists.rounding == "master":
        for p, master in zip(lists.params, lists.masters, strict=True):
            p.copy_(master)
