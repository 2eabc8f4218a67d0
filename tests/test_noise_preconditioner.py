"""The noise scale of Adam's update: gradients divided by √v̂ + ε, of all state formats and both strategies.

Hazards: v of after the update, where updates begin while gradients arrive; another step count in the bias
correction than that of v; ε in another unit than √v̂; 1/ε² of elements whose gradients were all 0; codes decoded
from within a block; the shard of one rank divided by the v of another; an empty shard mistaken for a rank without
gradients; an estimate of one form that continues in the other.
"""

import logging
import math

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks

from hvd_adam import Adam, distribute
from hvd_adam.distributed.noise import preconditioner
from hvd_adam.distributed.noise.estimate import RunningEstimate
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.distributed.noise.preconditioner import LEAST_UPDATES, Gradient, Preconditioner
from hvd_adam.distributed.noise.words import decode, encode
from hvd_adam.errors import UserError

BETA2, EPS = 0.9, 1e-3  # far from the defaults, so that both matter

# One process.


def adam_after(updates, params, **options):
    """An Adam after some updates with random gradients; those of the first 100 elements are 0."""
    optimizer = Adam(params, lr=1e-3, betas=(0.9, BETA2), eps=EPS, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad.view(-1)[:100] = 0
        optimizer.step()
    return optimizer


def brute_force(optimizer, name="exp_avg_sq"):
    """Σ (g / (√v̂ + ε))² in float64, from the state as torch.optim.Adam has it."""
    state, total = optimizer.state_dict()["state"], 0.0
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        v = state[i][name].double() / (1 - BETA2 ** float(state[i]["step"]))
        total += float((p.grad.double() / (v.sqrt() + EPS)).square()[v > 0].sum())
    return total


@pytest.mark.parametrize("elements", [1000, 1 << 18])  # of a temporary: 1000 divides codes within a block
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.float32, {"amsgrad": True}),
        (torch.float32, {"state_format": "bfloat16"}),
        (torch.float32, {"state_format": "8bit"}),
        (torch.bfloat16, {"state_format": "8bit", "master_weights": True}),
    ],
)
def test_squared_norms_are_those_of_float64_and_elements_without_v_do_not_count(
    monkeypatch, elements, dtype, options
):
    monkeypatch.setattr(preconditioner, "_CPU_ELEMENTS", elements)
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((90, 70), (33,), (64, 64))]
    optimizer = adam_after(7, params, **options)
    found = Preconditioner(optimizer, (0, 1))
    found.begin()
    for p in params:
        p.grad = torch.randn_like(p)  # also of the elements whose v is 0
    gradients = [Gradient(p, p.grad.view(-1)) for p in params]
    expected = brute_force(optimizer, "max_exp_avg_sq" if "amsgrad" in options else "exp_avg_sq")
    # Square root, sum, reciprocal and product round by 2⁻²⁴ each, a norm by some of them.
    assert float(found.square_norm(gradients, torch.device("cpu"))) == pytest.approx(expected, rel=2e-6)


def test_parameters_with_few_updates_do_not_count():
    params = [torch.nn.Parameter(torch.randn(300)) for _ in range(2)]
    optimizer = adam_after(LEAST_UPDATES - 1, params)
    found, device = Preconditioner(optimizer, (0, 1)), torch.device("cpu")
    found.begin()
    assert float(found.square_norm([Gradient(p, p.grad) for p in params], device)) == 0
    params[1].grad = None
    optimizer.step()
    found.begin()
    only, both = ([Gradient(p, torch.ones(300)) for p in params[:n]] for n in (1, 2))
    assert float(found.square_norm(only, device)) == float(found.square_norm(both, device)) > 0


def test_a_part_without_elements_is_a_number_where_ranks_send_parts():
    words = sum(encode(torch.tensor(number), rank, 2, zero_counts=True) for rank, number in enumerate((0.0, 3.0)))
    assert decode(words.tolist()) == [0.0, 3.0]
    words = encode(torch.tensor(math.nan), 0, 1, zero_counts=True)
    assert math.isnan(decode(words.tolist())[0])


def test_an_estimate_of_the_other_form_restarts_with_a_line_in_the_log(caplog):
    caplog.set_level(logging.INFO, logger="hvd_adam")
    meter = NoiseMeter(3, accumulate=2)
    for _ in range(20):
        meter.receive(encode(torch.tensor(2.0), 0, 1).tolist(), 1.5)
        meter.updated()
    assert meter.estimate() is not None
    adam = [NoiseMeter(3, 0, 1, 2, Preconditioner(adam_after(0, [torch.zeros(1)]), (0, 1))) for _ in range(2)]
    adam[0].load_state(meter.state())
    assert adam[0].estimate() is None and adam[0].state()[0] == meter.state()[0]
    assert "the form was 'gradient', and is 'adam' now: the estimate restarts" in caplog.text
    caplog.clear()
    adam[1].load_state(adam[0].state())
    assert adam[1].state() == adam[0].state() and not caplog.text
    old = NoiseMeter(3, accumulate=2)
    old.load_state(meter.state()[:-1])
    assert old.estimate() is None and "an earlier version saved it: the estimate restarts" in caplog.text


# On ranks.

FEATURES, OUTPUTS, SAMPLES, UPDATES = 48, 96, 4, 40  # a weight of 4,608 elements can be held in few bits
SIGMA = np.linspace(0.5, 2, FEATURES)
SIGNAL = 0.5


def draw(rank, update, micro_batch):
    """The mean of the samples of a micro-batch: SIGNAL plus noise of the standard deviations SIGMA."""
    generator = np.random.default_rng((rank, update, micro_batch))
    return SIGNAL + (SIGMA * generator.normal(size=(SAMPLES, FEATURES))).mean(0)


class Oracle:
    """The estimate in float64 from the gradients of all ranks, and from v before each update."""

    def __init__(self, cluster, accumulate):
        self.ranks, self.accumulate = cluster.size, accumulate
        self.estimate, self.signals, self.noises = RunningEstimate(), [], []

    def add(self, update, optimizer, beta2, eps):
        state = optimizer.state_dict()["state"][0]
        count = int(state["step"])
        if count < LEAST_UPDATES:
            return
        v = state["exp_avg_sq"].double().numpy() / (1 - beta2**count)
        weights = np.divide(1.0, (np.sqrt(v) + eps) ** 2, where=v > 0, out=np.zeros_like(v))
        micro_batches = range(self.accumulate)
        parts = np.array([[draw(rank, update, m) for m in micro_batches] for rank in range(self.ranks)])
        shares = parts.mean(1) if self.ranks > 1 else parts[0, :1]
        squares = (weights * shares[:, None] ** 2).reshape(len(shares), -1)
        own = squares.sum(1).mean() if optimizer.noise.shard == (0, 1) else self._of_shards(squares, optimizer)
        mean = (weights * parts.mean((0, 1)) ** 2).sum()
        self.estimate.add(own, mean, self.ranks if self.ranks > 1 else self.accumulate)
        self.signals.append((weights * SIGNAL**2).sum())
        self.noises.append((weights * SIGMA**2).sum())

    def _of_shards(self, squares, optimizer):
        (buffer,) = optimizer._layout.buffers
        parts = [buffer.parts(rank, self.ranks)[0] for rank in range(self.ranks)]
        assert sum(part.length for part in parts) == FEATURES * OUTPUTS
        return sum(row[part.skip :][: part.length].sum() for row, part in zip(squares, parts, strict=True))

    @property
    def truth(self):
        """tr Σ / |G|² in samples, for the mean of 1/v̂."""
        return sum(self.noises) / sum(self.signals)


def measured(cluster, accumulate, adam, **options):
    """The estimate of a linear loss, whose gradients have a known covariance, and that of the oracle."""
    model = torch.nn.Linear(FEATURES, OUTPUTS, bias=False)
    scaler = options.get("loss_scaler")
    given = Adam(model.parameters(), lr=0.0, eps=EPS, **adam)
    optimizer = distribute(given, model, accumulate=accumulate, noise_scale=1, noise_scale_form="adam", **options)
    oracle = Oracle(cluster, accumulate)
    for update in range(UPDATES):
        oracle.add(update, optimizer, 0.999, EPS)
        optimizer.zero_grad()
        for micro_batch in range(accumulate):
            loss = model(torch.tensor(draw(cluster.rank, update, micro_batch), dtype=torch.float32)).sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
    return optimizer.noise.estimate(), oracle


COMBINATIONS = [
    # As in test_noise_scale.py; a squared norm here has four more roundings of 2⁻²⁴ in each element.
    ({}, {}, 1, 1e-5),
    ({"defer_averaging": True}, {}, 1, 1e-5),  # on a CPU: updates are made while gradients arrive
    ({"max_grad_norm": 0.1, "defer_averaging": True}, {"state_format": "8bit"}, 2, 1e-5),
    ({"loss_scaler": "float16"}, {"state_format": "bfloat16"}, 1, 1e-5),
    ({"strategy": "sharded"}, {}, 3, 1e-5),
    ({"strategy": "sharded", "defer_averaging": True}, {"state_format": "8bit"}, 1, 1e-5),
    ({"strategy": "sharded", "compression": "int8"}, {}, 1, 1e-1),  # the mean is rounded
]


@on_ranks(2)
@pytest.mark.parametrize(("options", "adam", "accumulate", "tolerance"), COMBINATIONS)
def test_the_estimate_is_that_of_the_gradients_divided_by_v_and_near_the_truth(
    cluster, options, adam, accumulate, tolerance
):
    if "loss_scaler" in options:
        options = {"loss_scaler": torch.amp.GradScaler(cluster.device.type, init_scale=2.0**10, growth_interval=7)}
    found, oracle = measured(cluster, accumulate, adam, **options)
    assert list(found) == pytest.approx(list(oracle.estimate.read()), rel=tolerance)
    samples = cluster.size * accumulate * SAMPLES
    assert found.value * samples == pytest.approx(oracle.truth, rel=0.2)
    assert found.low * samples <= oracle.truth <= found.high * samples
    assert len({tuple(other) for other in cluster.gather(list(found))}) == 1


@on_ranks(2)
def test_weights_are_bit_for_bit_those_without_it_and_a_small_shard_may_be_empty(cluster):
    def train(strategy, **options):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)  # 4 elements: the shard of one rank
        optimizer = distribute(Adam(model.parameters(), lr=0.1), model, strategy=strategy, **options)
        for update in range(14):
            optimizer.zero_grad()
            inputs = torch.tensor(draw(cluster.rank, update, 0), dtype=torch.float32)[:3]
            model(inputs).square().sum().backward()
            optimizer.step()
        return model.weight.detach(), optimizer.noise

    for strategy in ("allreduce", "sharded"):
        weight, noise = train(strategy, noise_scale=1, noise_scale_form="adam")
        assert torch.equal(weight, train(strategy)[0])
        assert noise.state()[1] == 14 - LEAST_UPDATES and noise.estimate() is not None


@on_ranks(0)
def test_one_rank_compares_its_micro_batches(cluster):
    found, oracle = measured(cluster, 4, {})
    assert list(found) == pytest.approx(list(oracle.estimate.read()), rel=1e-5)
    assert found.low * 4 * SAMPLES <= oracle.truth <= found.high * 4 * SAMPLES


@on_ranks(0)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_scale": 1, "accumulate": 2, "noise_scale_form": "sgd"}, "noise_scale_form is 'sgd'; use one of"),
        ({"noise_scale_form": "adam"}, "noise_scale_form='adam' has no effect without noise_scale"),
    ],
)
def test_a_form_that_cannot_be_measured_is_refused(cluster, options, message):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(UserError, match=message):
        distribute(Adam(model.parameters()), model, **options)
