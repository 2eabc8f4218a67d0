"""The update of a list of tensors, in PyTorch's own operations: line by line, or all tensors together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_adam.optim.fused import Buffers, current_master, round_stochastically
from hvd_adam.optim.reference import adam_update

Group = dict[str, Any]


@dataclass
class Batch:
    """Tensors of one parameter group that share device and dtype, one entry a tensor in each list.

    Attributes:
        max_exp_avg_sqs: empty without AMSGrad.
        masters: float32 copies of half-precision parameters, empty where there are none.
        steps: number of the step to take, from 1.
        positions: where the tensor begins among all of the optimizer's, for stochastic rounding.
        counts: the state's own step tensors, where they are to be counted up.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, buffers: Buffers, step: float, position: int) -> Batch:
        """A batch of one piece of flat storage."""
        columns = [[] if tensor is None else [tensor] for tensor in vars(buffers).values()]
        return cls(*columns, [step], [position])

    def append(self, p: Tensor, state: dict[str, Tensor], position: int) -> None:
        """Adds a parameter by itself, with its state: all that is there is used."""
        self.params.append(p)
        self.grads.append(p.grad)
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        self.max_exp_avg_sqs += [state["max_exp_avg_sq"]] if "max_exp_avg_sq" in state else []
        self.masters += [state["master_param"]] if "master_param" in state else []
        self.steps.append(state["step"].item() + 1)
        self.positions.append(position)
        self.counts.append(state["step"])


def state_dtypes(group: Group, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The tensors that Adam keeps for each parameter of this dtype beside its step count, and their dtypes."""
    moments = moment_dtype(group, dtype)
    dtypes = {"exp_avg": moments, "exp_avg_sq": moments}
    if group["amsgrad"]:
        dtypes["max_exp_avg_sq"] = moments
    if rounding(group, dtype) == "master":
        dtypes["master_param"] = torch.float32
    return dtypes


def rounding(group: Group, dtype: torch.dtype) -> str:
    """How parameters of this dtype are stored: "nearest", "master" or "stochastic"."""
    if group["master_weights"] and dtype in (torch.float16, torch.bfloat16):
        return "master"
    return "stochastic" if group["stochastic_rounding"] and dtype == torch.bfloat16 else "nearest"


def moment_dtype(group: Group, dtype: torch.dtype) -> torch.dtype:
    """That of the parameters, as PyTorch has it, unless their precision is taken care of: then float32."""
    return dtype if rounding(group, dtype) == "nearest" else torch.float32


def seed(step: float, position: int) -> int:
    """Seeds stochastic rounding: other bits for each step and element, the same for all ranks."""
    return (int(step) * 0x9E3779B1 + position) % 2**31


def update_reference(batch: Batch, group: Group, grad_scale: Tensor | None) -> None:
    """Updates one tensor after the other by the oracle, in float64."""
    beta1, beta2 = group["betas"]
    thetas = _thetas(batch, group, torch.float64)
    maxima = batch.max_exp_avg_sqs or [None] * len(batch.params)
    columns = (thetas, batch.grads, batch.exp_avgs, batch.exp_avg_sqs, maxima, batch.steps)
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
            epsilon=group["eps"],
            lambda_=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            maximize=group["maximize"],
        )
    _store(batch, group, thetas)


def update_foreach(batch: Batch, group: Group, grad_scale: Tensor | None) -> None:
    """Updates all tensors together, in their own dtype.

    The order of operations is the usual one of the plain formulas in PyTorch, so that results agree with
    ``torch.optim.Adam`` to the last bit wherever the same kernels run. Temporaries: one copy of the
    batch's parameters for the denominator, one each for ``grad_scale``, ``maximize``, coupled weight decay
    and half-precision parameters with float32 moments.
    """
    lr, weight_decay = float(group["lr"]), group["weight_decay"]
    beta1, beta2 = group["betas"]
    thetas = _thetas(batch, group, torch.float32)
    grads = [g.to(m.dtype) for g, m in zip(batch.grads, batch.exp_avgs, strict=True)]
    if grad_scale is not None:
        grads = torch._foreach_mul(grads, grad_scale.to(grads[0].dtype))
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    if weight_decay != 0:
        if group["decoupled_weight_decay"]:
            torch._foreach_mul_(thetas, 1 - lr * weight_decay)
        else:
            grads = torch._foreach_add(grads, thetas, alpha=weight_decay)

    torch._foreach_lerp_(batch.exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(batch.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(batch.exp_avg_sqs, grads, grads, 1 - beta2)
    second_moments = batch.exp_avg_sqs
    if group["amsgrad"]:
        torch._foreach_maximum_(batch.max_exp_avg_sqs, batch.exp_avg_sqs)
        second_moments = batch.max_exp_avg_sqs

    denominators = torch._foreach_sqrt(second_moments)
    torch._foreach_div_(denominators, [(1 - beta2**t) ** 0.5 for t in batch.steps])
    torch._foreach_add_(denominators, group["eps"])
    step_sizes = [-(lr / (1 - beta1**t)) for t in batch.steps]
    torch._foreach_addcdiv_(thetas, batch.exp_avgs, denominators, step_sizes)
    _store(batch, group, thetas)


def _thetas(batch: Batch, group: Group, dtype: torch.dtype) -> list[Tensor]:
    """What is updated: the parameters, their masters, or wider copies of them."""
    if rounding(group, batch.params[0].dtype) == "stochastic":
        return [p.to(dtype) for p in batch.params]
    for p, master in zip(batch.params if batch.masters else (), batch.masters, strict=True):
        master.copy_(current_master(p, master))
    return batch.masters or batch.params


def _store(batch: Batch, group: Group, thetas: list[Tensor]) -> None:
    """Rounds what has been updated into the parameters, where it is not the parameters themselves."""
    if rounding(group, batch.params[0].dtype) == "stochastic":
        for p, theta, step, position in zip(batch.params, thetas, batch.steps, batch.positions, strict=True):
            wide = theta.float().contiguous().reshape(-1)
            p.copy_(round_stochastically(wide, torch.tensor(seed(step, position))).view(p.shape))
    elif batch.masters:
        for p, master in zip(batch.params, batch.masters, strict=True):
            p.copy_(master)
