"""Random training runs of Adam, and a float64 oracle with a running bound on the rounding error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from hvd_adam.optim.adam import Adam
from hvd_adam.optim.reference import adam_update

IMPLEMENTATIONS = ("reference", "foreach", "fused")


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


SHAPES = ((), (1,), (0,), (7,), (3, 5), (33,), (2, 3, 2, 2))
# beta1^2 < beta2, so that by Cauchy and Schwarz m / sqrt(v) stays bounded, as Adam's analysis needs.
BETAS = ((0.9, 0.999), (0.9, 0.9), (0.0, 0.9), (0.5, 0.5), (0.8, 0.99))


@dataclass(frozen=True)
class Case:
    """A random training run: for each parameter its shape and how often it has a gradient."""

    seed: int
    groups: list[list[tuple[tuple[int, ...], str]]]
    overrides: list[dict]
    options: dict
    decoupled: bool
    lr: float
    lr_is_tensor: bool
    scale: float

    def parameters(self, dtype):
        generator = torch.Generator().manual_seed(self.seed)
        params = []
        for shape, presence in (entry for group in self.groups for entry in group):
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            params.append(torch.nn.Parameter(values, requires_grad=presence != "frozen"))
        return params

    def gradients(self, dtype, steps):
        generator = torch.Generator().manual_seed(self.seed + 1)
        chance = {"always": 1.0, "sometimes": 0.5, "unused": 0.0, "frozen": 0.0}
        entries = [entry for group in self.groups for entry in group]
        for _ in range(steps):
            draws = torch.rand(len(entries), generator=generator).tolist()
            yield [
                (torch.randn(shape, generator=generator, dtype=torch.float64) * self.scale).to(dtype)
                if draw < chance[presence]
                else None
                for (shape, presence), draw in zip(entries, draws, strict=True)
            ]

    def optimizer(self, make, params, **extra):
        rest = iter(params)
        groups = [
            {"params": [next(rest) for _ in group], **override}
            for group, override in zip(self.groups, self.overrides, strict=True)
        ]
        lr = torch.tensor(self.lr, dtype=torch.float64) if self.lr_is_tensor else self.lr
        return make(groups, lr=lr, **self.options, **extra)

    def ours(self, params, implementation):
        extra = dict(decoupled_weight_decay=self.decoupled, implementation=implementation)
        return self.optimizer(Adam, params, **extra)

    def theirs(self, params, foreach):
        return self.optimizer(torch.optim.AdamW if self.decoupled else torch.optim.Adam, params, foreach=foreach)


@st.composite
def cases(draw):
    entry = st.tuples(
        st.sampled_from(SHAPES), st.sampled_from(("always", "always", "sometimes", "unused", "frozen"))
    )
    groups = draw(st.lists(st.lists(entry, min_size=1, max_size=4), min_size=1, max_size=3))
    scale = draw(st.sampled_from((1.0, 30.0, 1e-2)))
    # An error of theta comes back through the coupled decay and grows by 1 + lr * decay / sqrt(v) a step, for
    # any implementation: with the decay in proportion to the gradients that is less than e in 100 steps.
    decays = st.sampled_from((0.0, 0.01 * scale, 0.1 * scale))
    override = st.fixed_dictionaries(
        {},
        optional={
            "lr": st.sampled_from((1e-2, 3e-4)),
            "betas": st.sampled_from(BETAS),
            "weight_decay": decays,
            "amsgrad": st.booleans(),
        },
    )
    options = {
        "betas": draw(st.sampled_from(BETAS)),
        "eps": draw(st.sampled_from((1e-8, 1e-3))),
        "weight_decay": draw(decays),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    return Case(
        seed=draw(st.integers(0, 2**20)),
        groups=groups,
        overrides=[draw(override) for _ in groups],
        options=options,
        decoupled=draw(st.booleans()),
        lr=draw(st.sampled_from((1e-3, 0.1, 1e-5))),
        lr_is_tensor=draw(st.booleans()),
        scale=scale,
    )


@dataclass
class Oracle:
    """One parameter in float64, with a running bound on the error of an evaluation in another arithmetic.

    The bound is Wilkinson's running error analysis, to first order: ``e_x`` bounds the error of x element by
    element, each floating-point operation of dtype's arithmetic adds u times its result's magnitude (u: unit
    roundoff; a stored constant such as 1 - beta1 counts as an operation), plus the smallest subnormal number
    where results may underflow, and errors travel through each formula by its derivatives. Where the arithmetic
    is done in a wider dtype, ``stored`` is the unit roundoff of the one in which results are kept.
    """

    group: dict
    decoupled: bool
    theta: torch.Tensor
    u: float
    tiny: float
    stored: float = 0.0
    t: int = 0
    valid: bool = True
    moments: dict = field(default_factory=dict)

    def __post_init__(self):
        names = ("m", "v", "v_max", "e_m", "e_v", "e_v_max")
        self.moments = {name: torch.zeros_like(self.theta) for name in names}
        self.e_theta = torch.zeros_like(self.theta)
        self.largest = self.theta.abs()

    def step(self, gradient):
        self.t += 1
        s, group, u, tiny = self.moments, self.group, self.u, self.tiny
        lr, (beta1, beta2), stored = float(group["lr"]), group["betas"], self.stored
        decay = 0.0 if self.decoupled else group["weight_decay"]
        shrink = lr * group["weight_decay"] if self.decoupled else 0.0
        g = -gradient if group["maximize"] else gradient
        if shrink:
            self.e_theta += 2 * u * self.theta.abs() + tiny
        e_g = (2 * u * (g.abs() + decay * self.theta.abs()) + decay * self.e_theta + tiny) if decay else 0 * g
        total = g + decay * self.theta

        old_m, before = s["m"].clone(), self.theta.clone()
        adam_update(
            *(self.theta, gradient, s["m"], s["v"], s["v_max"] if group["amsgrad"] else None),
            **dict(t=self.t, alpha=lr, beta1=beta1, beta2=beta2, epsilon=group["eps"]),
            **dict(lambda_=group["weight_decay"], decoupled=self.decoupled, maximize=group["maximize"]),
        )
        # lerp: difference, constant, product, sum. Second moment: two constants, three products, one sum.
        s["e_m"] = beta1 * s["e_m"] + (1 - beta1) * e_g + 4 * u * (old_m.abs() + total.abs()) + 2 * tiny
        s["e_m"] += stored * s["m"].abs()
        s["e_v"] = beta2 * s["e_v"] + (1 - beta2) * 2 * total.abs() * e_g + (6 * u + stored) * s["v"] + 3 * tiny
        s["e_v_max"] = torch.maximum(s["e_v_max"], s["e_v"])
        v, e_v = (s["v_max"], s["e_v_max"]) if group["amsgrad"] else (s["v"], s["e_v"])

        correction = math.sqrt(1 - beta2**self.t)
        denominator = v.sqrt() / correction + group["eps"]
        # |sqrt(a) - sqrt(b)| <= |a - b| / sqrt(a), and <= sqrt(|a - b|). Root, quotient, constants, sum.
        e_root = torch.minimum(e_v / v.sqrt(), e_v.sqrt()).nan_to_num(0.0)
        e_denominator = e_root / correction + 5 * u * denominator + 2 * tiny
        self.valid &= bool((e_denominator <= denominator / 4).all())
        size = lr / (1 - beta1**self.t)
        move = size * s["m"].abs() / denominator
        # Constant, quotient, product, sum, and the rounding of theta itself.
        e_move = size * s["e_m"] / denominator + move * e_denominator / denominator + 4 * u * move
        self.e_theta += e_move + (u + stored) * (before.abs() + 2 * move) + 2 * tiny
        self.largest = torch.maximum(self.largest, self.theta.abs())


def oracles(case, dtype, arithmetic=None):
    """Returns a float64 oracle for each parameter of the case, in order."""
    params = case.parameters(dtype)
    info = torch.finfo(dtype)
    roundoffs = dict(u=unit_roundoff(arithmetic or dtype), tiny=info.smallest_normal * info.eps)
    roundoffs["stored"] = 0.0 if arithmetic is None else unit_roundoff(dtype)
    return [
        Oracle(group, case.decoupled, p.detach().double(), **roundoffs)
        for group in case.ours(params, "reference").param_groups
        for p in group["params"]
    ]


def sweep(examples):
    """Settings for a sweep of so many drawn cases; fewer in the quick tests, see conftest."""
    return settings(
        max_examples=min(examples, settings.default.max_examples),
        derandomize=True,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
