"""Batch-size scaling rules for Adam's hyper-parameters, and the learning rate as a pure function of the step.

Imports neither torch nor numpy: the command line checks its arguments with it before slow modules are loaded.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from hvd_adam.errors import UserError

SCALING_RULES = ("linear", "sqrt", "halflife", "none")
DECAYS = ("constant", "cosine", "linear", "step")


class Scaled(NamedTuple):
    """Adam's hyper-parameters after scaling: learning rate, (β₁, β₂) and ε."""

    lr: float
    betas: tuple[float, float]
    eps: float


def scale(factor: float, rule: str, *, lr: float, betas: tuple[float, float], eps: float) -> Scaled:
    """Returns Adam's hyper-parameters for a batch that is `factor` times the one they were tuned for.

    Rules, with factor k:

    - "linear": lr·k; betas and eps are unchanged (Goyal et al., arXiv 1706.02677, section 2.1).
    - "sqrt": lr·√k, 1−β → k·(1−β), eps/√k (Malladi et al. 2022, arXiv 2205.10287, the square root scaling rule for
      Adam).
    - "halflife": β₂ → β₂ᵏ (Marek et al. 2025, arXiv 2507.07101): the second moment forgets a sample after the same
      number of samples, whatever the batch; β₂ stays within [0, 1) for every k. lr, β₁ and eps are unchanged:
      choose lr for the whole batch.
    - "none": nothing changes.

    Args:
        factor: > 0, usually world size × accumulated micro-batches.
        rule: one of SCALING_RULES.
        lr: learning rate.
        betas: β₁ and β₂.
        eps: ε.

    Raises:
        UserError: the rule is unknown, the factor is not a positive number, or "sqrt" would make a beta negative.
    """
    if rule not in SCALING_RULES:
        raise UserError(f"learning-rate scaling {rule!r} is not known: use one of {', '.join(SCALING_RULES)}")
    if not (math.isfinite(factor) and factor > 0):
        raise UserError(f"the batch-size factor {factor} must be a positive number")
    if rule == "none":
        return Scaled(lr, betas, eps)
    if rule == "linear":
        return Scaled(lr * factor, betas, eps)
    if rule == "halflife":
        return Scaled(lr, (betas[0], betas[1] ** factor), eps)
    root = math.sqrt(factor)
    first, second = (_scaled_beta(factor, index, beta) for index, beta in enumerate(betas))
    return Scaled(lr * root, (first, second), eps / root)


def _scaled_beta(factor: float, index: int, beta: float) -> float:
    # Equal to 1 − k(1−β), but exact at k = 1.
    scaled = beta - (factor - 1) * (1 - beta)
    if scaled >= 0:
        return scaled
    largest = 1 / (1 - beta)
    needed = 1 - 1 / factor
    raise UserError(
        f"sqrt scaling by a factor of {factor:g} turns beta{index + 1} = {beta:g} into {scaled:.3g}, below "
        f"0: use a factor of at most {largest:.6g}, a beta{index + 1} of at least {needed:.6g}, or linear, "
        "halflife or no scaling"
    )


@dataclass(frozen=True)
class LearningRateSchedule:
    """A warm-up from `initial` to `peak`, then a decay; an argument of `learning_rate`.

    Raises:
        UserError: a field is out of range.
    """

    peak: float
    """The (scaled) rate at the end of the warm-up, ≥ 0."""
    total_steps: int
    """Updates in the whole run, ≥ 1."""
    initial: float = 0.0
    """The (unscaled) rate of step 0 of the warm-up, ≥ 0; unused without a warm-up."""
    warmup_steps: float = 0.0
    """Length of the warm-up in steps, ≥ 0; may be a fraction, and longer than the run."""
    decay: str = "constant"
    """`"constant"`, `"cosine"`, `"linear"` or `"step"`."""
    milestones: tuple[float, ...] = ()
    """For `"step"`: the steps, ascending, from each of which on the rate is multiplied by `factor`."""
    factor: float = 0.1
    """For `"step"`: the multiplier at each milestone, in (0, 1]."""

    def __post_init__(self) -> None:
        for name in ("peak", "initial", "warmup_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"the learning-rate schedule's {name} = {value} must be 0 or a positive number")
        if self.total_steps < 1:
            raise UserError(f"the learning-rate schedule's total_steps = {self.total_steps} must be at least 1")
        if self.decay not in DECAYS:
            raise UserError(f"learning-rate decay {self.decay!r} is not known: use one of {', '.join(DECAYS)}")
        if self.decay == "step" and not self.milestones:
            raise UserError("step decay of the learning rate needs at least one milestone")
        if any(m <= 0 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(f"the decay milestones {list(self.milestones)} must be positive and ascending")
        if not 0 < self.factor <= 1:
            raise UserError(f"the step-decay factor {self.factor} must be above 0 and at most 1")


def learning_rate(step: int, schedule: LearningRateSchedule) -> float:
    """Returns the learning rate of an update.

    During the warm-up the rate rises linearly from `initial` to `peak` (Goyal et al., arXiv 1706.02677, section
    2.2). After it the rate is `peak` times the decay. The decay of "cosine" (Loshchilov & Hutter, arXiv
    1608.03983, equation 5, with minimum 0) and "linear" falls from 1 at the end of the warm-up to 0 at
    `total_steps`, so the last update still has a positive rate. Milestones of "step" apply during the warm-up too.

    Args:
        step: index of the update, from 0.
        schedule: the schedule.
    """
    return _warmed_up(step, schedule) * _decay(step, schedule)


def _warmed_up(step: int, schedule: LearningRateSchedule) -> float:
    if step >= schedule.warmup_steps:
        return schedule.peak
    return schedule.initial + (schedule.peak - schedule.initial) * (step / schedule.warmup_steps)


def _decay(step: int, schedule: LearningRateSchedule) -> float:
    if schedule.decay == "constant":
        return 1.0
    if schedule.decay == "step":
        return schedule.factor ** sum(step >= milestone for milestone in schedule.milestones)
    if step <= schedule.warmup_steps:
        return 1.0
    if step >= schedule.total_steps:
        return 0.0
    progress = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    if schedule.decay == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))
