"""The gradient noise scale: what the ranks send, the estimate with its interval, and where it is refused.

Hazards: a sum over ranks that rounds one rank's number, or overflows float16; gradients after the mean, the codes
or the loss scale instead of the rank's own; a mean of which each rank has a part; a factor for ranks or
micro-batches that is counted twice; a ratio of averages mistaken for an average of ratios; an interval that
promises a value where there is none; measured updates that a resume shifts.
"""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.on_ranks import on_ranks

from hvd_adam import Adam, distribute
from hvd_adam.config import TrainConfig
from hvd_adam.data import digits
from hvd_adam.distributed.noise.estimate import RunningEstimate
from hvd_adam.distributed.noise.meter import NoiseMeter
from hvd_adam.distributed.noise.words import WORDS, decode, encode
from hvd_adam.errors import UserError

# What the ranks send.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_number_of_each_rank_is_exact_in_the_sum_of_any_dtype(dtype):
    numbers = [3.4e38, 1 / 3, 1e-30, 65504.0 * 65504.0]
    words = [encode(torch.tensor(number), rank, 4).to(dtype) for rank, number in enumerate(numbers)]
    received = decode(sum(words).float().tolist())
    assert received == [torch.tensor(number).item() for number in numbers]


@pytest.mark.parametrize("number", [0.0, math.inf, math.nan])
def test_a_rank_without_a_finite_gradient_has_no_number_and_spoils_no_sum(number):
    words = encode(torch.tensor(number), 1, 2)
    assert words.tolist() == [0.0] * (2 * WORDS)
    assert all(map(math.isnan, decode(words.tolist())))


# The estimate.


def measurements(count, signal, noise, dimensions, shares, seed=0):
    """Returns S and L of `count` updates, in float64, for gradients with independent elements."""
    draws = np.random.default_rng(seed).normal(size=(count, shares, dimensions))
    gradients = math.sqrt(signal / dimensions) + math.sqrt(noise * shares / dimensions) * draws
    return (gradients**2).sum(2).mean(1), (gradients.mean(1) ** 2).sum(1)


def estimate_of(own, mean, shares):
    running = RunningEstimate()
    for s, m in zip(own, mean, strict=True):
        running.add(s, m, shares)
    return running.read()


def test_the_interval_contains_the_true_ratio_about_as_often_as_it_promises():
    found = [estimate_of(*measurements(60, 1.0, 4.0, 300, 4, seed), 4) for seed in range(200)]
    covered = sum(estimate.low <= 4.0 <= estimate.high for estimate in found)
    # 95 % of 200 are 190, with a standard deviation of 3.1. Fieller's interval is approximate: 1 % is for that.
    assert covered >= 190 - 4 * 3.1 - 2


def test_without_a_signal_the_interval_has_no_upper_end():
    estimate = estimate_of(*measurements(60, 0.0, 4.0, 300, 4), 4)
    assert estimate.high == math.inf and estimate.low > 1


def test_without_noise_the_estimate_is_zero():
    assert estimate_of([2.0] * 9, [2.0] * 9, 2) == (0.0, 0.0, 0.0)


def test_large_norms_do_not_count_for_more_than_small_ones():
    own, mean = measurements(100, 1.0, 4.0, 300, 4)
    falling = np.geomspace(1e6, 1.0, 100)
    steady, changed = estimate_of(own, mean, 4), estimate_of(own * falling, mean * falling, 4)
    assert changed.low <= 4.0 <= changed.high
    # Each norm is 0.87 of the last, so the mean of earlier ones is soon the same multiple of each, and divides all
    # but the first few equally. By themselves 7 of the 100 would count: an interval 3.7 times as long.
    assert changed.high - changed.low < 1.5 * (steady.high - steady.low)


def test_measurements_that_are_not_finite_do_not_count():
    running = RunningEstimate()
    for s in (1.0, math.nan, math.inf, 2.0, 1.0, 1.5, 1.0):
        running.add(s, 0.9, 2)
    assert running.state()[0] == 5


def test_an_interval_that_has_no_upper_end_contains_0_and_the_value_where_the_noise_may_be_0():
    running = RunningEstimate()
    for own, mean in [(1.06, 1.0), (0.83, 0.7), (7.14, 5.8), (1.41, 1.3), (0.65, 0.5)]:
        running.add(own, mean, 2)
    estimate = running.read()
    assert (estimate.low, estimate.high) == (0.0, math.inf) and estimate.value > 0


def test_the_interval_always_contains_the_value():
    generator = np.random.default_rng(0)
    for _ in range(3000):
        running = RunningEstimate()
        for norm in generator.lognormal(0, 1, generator.integers(5, 12)):
            x, y = generator.normal(size=(2, 4)) + 0.3
            own, mean = norm * ((x @ x + y @ y) / 2), norm * (((x + y) / 2) @ ((x + y) / 2))
            running.add(own, mean, 2)
        estimate = running.read()
        assert 0 <= estimate.low <= estimate.value <= estimate.high


def test_a_meter_continues_from_its_state_in_the_same_updates_bit_for_bit():
    def run(meter, updates):
        for update in updates:
            if meter.due:
                meter.receive(encode(torch.tensor(2.0 + update % 3), 0, 1).tolist(), 1.0 + update % 2)
            meter.updated()
        return meter.state()

    through = run(NoiseMeter(3, accumulate=2), range(40))
    first = run(NoiseMeter(3, accumulate=2), range(16))
    second = NoiseMeter(3, accumulate=2)
    second.load_state(first)
    assert run(second, range(16, 40)) == through


# On ranks.

FEATURES, OUTPUTS, SAMPLES, UPDATES = 48, 5, 4, 60
SIGMA = np.linspace(0.5, 2, FEATURES)
SIGNAL = 0.5
TRUTH = float((SIGMA**2).sum() / (FEATURES * SIGNAL**2))  # tr Σ / |G|², in samples


def draw(rank, update, micro_batch):
    """The mean of the samples of a micro-batch: SIGNAL plus noise of the standard deviations SIGMA."""
    generator = np.random.default_rng((rank, update, micro_batch))
    return SIGNAL + (SIGMA * generator.normal(size=(SAMPLES, FEATURES))).mean(0)


def brute_force(ranks, accumulate):
    """The estimate in float64 from the gradients of all ranks themselves."""
    own, mean = [], []
    for update in range(UPDATES):
        parts = np.array([[draw(r, update, m) for m in range(accumulate)] for r in range(ranks)])
        shares = parts.mean(1) if ranks > 1 else parts[0, :1]
        own.append(OUTPUTS * (shares**2).sum(1).mean())
        mean.append(OUTPUTS * (parts.mean((0, 1)) ** 2).sum())
    return estimate_of(own, mean, ranks if ranks > 1 else accumulate)


def measured(cluster, accumulate, **options):
    """The estimate of a linear loss, whose gradient is that of a quadratic at a fixed point: its covariance is
    known."""
    model = torch.nn.Linear(FEATURES, OUTPUTS, bias=False)
    scaler = options.get("loss_scaler")
    optimizer = distribute(
        Adam(model.parameters(), lr=0.0), model, accumulate=accumulate, noise_scale=1, **options
    )
    for update in range(UPDATES):
        optimizer.zero_grad()
        for micro_batch in range(accumulate):
            loss = model(torch.tensor(draw(cluster.rank, update, micro_batch), dtype=torch.float32)).sum()
            (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
    return optimizer.noise.estimate()


@on_ranks(2)
@pytest.mark.parametrize(
    ("options", "accumulate", "tolerance"),
    [
        # S and L are sums of squares in float32, of which S − L is a tenth: some 2⁻²⁴ · 10, and a reserve.
        ({}, 1, 1e-5),
        ({"strategy": "sharded"}, 3, 1e-5),
        ({"max_grad_norm": 0.1, "defer_averaging": True}, 2, 1e-5),
        ({"defer_averaging": True}, 1, 1e-5),  # on a CPU: updates are made while gradients arrive
        ({"loss_scaler": "float16"}, 1, 1e-5),
        # The mean is rounded: by 2⁻¹¹ and by 2⁻⁸ of each element, and L by as much in the worst case.
        ({"compression": "fp16"}, 1, 2e-2),
        ({"compression": "bf16"}, 1, 1e-1),
        ({"compression": "int8", "strategy": "sharded"}, 1, 1e-1),
    ],
)
def test_the_estimate_is_that_of_the_gradients_themselves_and_near_the_truth(
    cluster, options, accumulate, tolerance
):
    if "loss_scaler" in options:
        options = {"loss_scaler": torch.amp.GradScaler(cluster.device.type, init_scale=2.0**10, growth_interval=7)}
    found, expected = measured(cluster, accumulate, **options), brute_force(cluster.size, accumulate)
    assert list(found) == pytest.approx(list(expected), rel=tolerance)
    samples = cluster.size * accumulate * SAMPLES
    assert found.value * samples == pytest.approx(TRUTH, rel=0.2)
    assert found.low * samples <= TRUTH <= found.high * samples
    assert len({tuple(other) for other in cluster.gather(list(found))}) == 1


@on_ranks(2)
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("compression", ["none", "bf16"])
@pytest.mark.parametrize("used", ["abcdef", "ace"])
def test_buckets_that_are_all_sent_at_the_end_of_backward_count_together(cluster, used, compression, deferred):
    """Those with an unused parameter are."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 40, bias=False) for name in "abcdef"})
    options = {"compression": compression, "defer_averaging": deferred}
    optimizer = distribute(Adam(model.parameters()), model, noise_scale=1, bucket_mib=0.0013, **options)
    found = []
    optimizer.noise._estimate.add = lambda own, mean, shares: found.append((own, mean))
    inputs = torch.randn(cluster.size, 5, 4)  # the same on every rank
    gradients = []
    for batch in inputs:
        loss = sum(model[name](batch).square().mean() for name in used)
        parts = torch.autograd.grad(loss, [model[name].weight for name in used])
        gradients.append(torch.cat([part.flatten() for part in parts]))
    sum(model[name](inputs[cluster.rank]).square().mean() for name in used).backward()
    optimizer.step()
    mean = torch.stack(gradients).mean(0).square().sum()
    ((own, of_mean),) = found
    assert own == pytest.approx(statistics.mean(g.square().sum().item() for g in gradients), rel=1e-5)
    assert of_mean == pytest.approx(mean.item(), rel=1e-5 if compression == "none" else 1e-2)


@on_ranks(0)
def test_one_rank_compares_its_micro_batches(cluster):
    found, expected = measured(cluster, 4), brute_force(1, 4)
    assert list(found) == pytest.approx(list(expected), rel=1e-5)
    assert found.low * 4 * SAMPLES <= TRUTH <= found.high * 4 * SAMPLES


def true_noise_scale(model, images, labels):
    """tr Σ / |G|² in samples, float64: G is the mean of the gradients of all samples, Σ their covariance."""
    gradients = []
    for image, label in zip(images.double(), labels, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        gradients.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*model.parameters()])]))
    stacked = torch.stack(gradients)
    signal = stacked.mean(dim=0).square().sum()
    return float((stacked.square().sum(dim=1).mean() - signal) / signal)


@on_ranks(2)
@pytest.mark.parametrize("updates_before", [0, 60], ids=["untrained", "trained"])
def test_the_estimate_on_digits_is_near_that_of_the_gradients_of_all_samples(cluster, updates_before):
    data = digits.load()
    images = torch.from_numpy(data.train_images).flatten(1).float() / 255
    labels = torch.from_numpy(data.train_labels).long()
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = distribute(Adam(model.parameters(), lr=3e-3), model, noise_scale=1)
    generator = torch.Generator().manual_seed(cluster.rank)

    def update():
        rows = torch.randint(len(images), (64,), generator=generator)  # independent samples, as theory has them
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()

    for _ in range(updates_before):
        update()
    optimizer.param_groups[0]["lr"] = 0.0  # the weights stay, so that there is one truth
    found = []
    for _ in range(4):  # one estimate has a standard error of 7 to 9 %, by its interval; their mean half of that
        optimizer.noise.load_state(NoiseMeter(1).state())  # forgets the updates before
        for _ in range(200):
            update()
        found.append(optimizer.noise.estimate().value * 128)
    expected = true_noise_scale(copy.deepcopy(model).double(), images, labels)
    assert statistics.fmean(found) == pytest.approx(expected, rel=0.2), found


@on_ranks(2)
def test_updates_are_bit_for_bit_those_without_it_and_uncertain_ones_do_not_count(cluster):
    def train(noise_scale, twice=False):
        torch.manual_seed(0)
        model = torch.nn.Linear(FEATURES, OUTPUTS)
        optimizer = distribute(Adam(model.parameters(), lr=0.1), model, noise_scale=noise_scale)
        for update in range(8):
            optimizer.zero_grad()
            for _ in range(1 + twice):
                inputs = torch.tensor(draw(cluster.rank, update, 0), dtype=torch.float32)
                model(inputs).square().sum().backward()
            optimizer.step()
        return model.weight.detach(), optimizer

    weight, off = train(None)
    assert torch.equal(train(2)[0], weight) and off.noise.state() == [] and off.noise.estimate() is None
    assert train(1)[1].noise.estimate() is not None
    assert train(1, twice=True)[1].noise.estimate() is None  # the second pass averages what is a mean already


@on_ranks(0)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_scale": 0}, "noise_scale is 0; it must be a whole number"),
        ({"noise_scale": True}, "noise_scale is True"),
        ({"noise_scale": 2}, "use accumulate ≥ 2"),
        ({"noise_scale": 2, "op": "adasum"}, "adasum has not"),
    ],
)
def test_what_cannot_be_measured_is_refused(cluster, options, message):
    model = torch.nn.Linear(2, 1)
    with pytest.raises(UserError, match=message):
        distribute(Adam(model.parameters()), model, **options)


def test_the_command_refuses_one_rank_with_one_micro_batch_and_adasum():
    with pytest.raises(UserError, match="--noise-scale 5 compares ranks, or micro-batches"):
        TrainConfig(noise_scale=5).global_batch(1)
    assert TrainConfig(noise_scale=5, accumulate=2).global_batch(1) == 64
    with pytest.raises(UserError, match="--noise-scale"):
        TrainConfig(noise_scale=5, op="adasum")
    with pytest.raises(UserError, match="noise-scale is 0"):
        TrainConfig(noise_scale=0)
