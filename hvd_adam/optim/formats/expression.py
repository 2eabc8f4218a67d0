"""The fused update of tensors whose state is held in few bits: what kernels must compute, one by one.

Moments are decoded, updated and encoded in one pass. Factors are folded, so that a kernel multiplies less: with
level L and scale S of the first moment, and code C and scale S' of the root of the second one,

    m = S (β₁/316) L + (1−β₁) g        √v = √((S' (√β₂/255) C)² + (√(1−β₂) g)²)

where a factor of the gradient is part of (1−β₁) and √(1−β₂), unless a decay is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_adam.optim import expression
from hvd_adam.optim.expression import KernelSpec, current_master, decay_of
from hvd_adam.optim.formats import eight_bit
from hvd_adam.optim.formats.correction import decode_parameter
from hvd_adam.optim.formats.held import CORRECTION, FIRST_CODES, SECOND_CODES
from hvd_adam.optim.formats.pieces import encode
from hvd_adam.optim.formats.random_bits import round_stochastically, rounding_seed


def factors(spec: KernelSpec, group: Mapping[str, Any], grad_scale: float) -> tuple[float, float, float, float]:
    """Returns what the old first and second moment and the gradient, for both, are multiplied by.

    Args:
        spec: of the update.
        group: the hyper-parameters.
        grad_scale: factor of the gradients; 1 where it has been applied to them.
    """
    beta1, beta2 = map(float, group["betas"])
    new = (1 - beta1) * grad_scale, math.sqrt(1 - beta2) * grad_scale
    if spec.state_format == "8bit":
        return beta1 / eight_bit.LEVELS, math.sqrt(beta2) / eight_bit.CODES, *new
    return beta1, beta2, *new


def update_uncompiled(
    spec: KernelSpec,
    p: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    grad_scale: float,
    group: Mapping[str, Any],
    step: float,
    position: int,
) -> None:
    """Updates one parameter in place: the reference that kernels are compared with.

    Args:
        spec: fits the tensors.
        p: the parameter, 1-dimensional.
        grad: its gradient, 1-dimensional.
        state: its state, 1-dimensional.
        grad_scale: multiplies the gradient.
        group: the hyper-parameters.
        step: number of the step, from 1.
        position: index of the first element among all of the optimizer's.
    """

    def number(x: float) -> Tensor:
        return torch.tensor(x, dtype=torch.float32, device=p.device)

    grad_scale = -grad_scale if group["maximize"] else grad_scale
    numbers, decay, g = expression.scalars(group, step), decay_of(group), grad.float()
    theta = p.float()
    if spec.rounding == "correction":
        theta = decode_parameter(p, state[CORRECTION])
    elif spec.rounding == "master":
        theta = current_master(p, state["master_param"])
    if decay == "coupled":
        g, grad_scale = g * number(grad_scale) + number(numbers.weight_decay) * theta, 1.0
    elif decay == "decoupled":
        theta = theta + number(numbers.weight_decay) * theta
    first_kept, second_kept, first_new, second_new = map(number, factors(spec, group, grad_scale))
    added = second_new * g
    if spec.state_format == "8bit":
        codes, scales = (state[name] for name in FIRST_CODES)
        first = eight_bit.spread(scales.float() * first_kept, p.numel()) * eight_bit.levels(codes) + first_new * g
        codes, scales = (state[name] for name in SECOND_CODES)
        kept = eight_bit.spread(scales.float() * second_kept, p.numel()) * codes.float()
        second = kept * kept + added * added
    else:
        first = first_kept * state["exp_avg"].float() + first_new * g
        second = second_kept * state["exp_avg_sq"].float() + added * added
    theta = theta - number(numbers.step_size) * (first / (eight_bit.exact_sqrt(second) + number(numbers.eps)))
    seed = rounding_seed(int(step), position)
    updated = {"exp_avg": first, "exp_avg_sq": second, "master_param": theta}
    encode(p, state, updated, spec.state_format, seed)
    if spec.rounding == "master":
        state["master_param"].copy_(theta)
    elif spec.rounding == "stochastic":
        theta = round_stochastically(theta, torch.tensor(seed, dtype=torch.int64, device=p.device))
    if spec.rounding != "correction":
        p.copy_(theta)
