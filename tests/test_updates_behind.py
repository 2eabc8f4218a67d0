"""Updates of buckets while others are still being reduced.

Hazards: an update before it is known that a gradient of another bucket is not finite, or that ranks have parted; a
sum that overflows although no gradient does; other bits than those of an update that waits; residuals of codes
that are dropped; a derived class whose step uses gradients before they have arrived; a parameter without
gradients that moves.
"""

import math
from contextlib import contextmanager

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import digest, everything, same_everywhere
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.distributed.collectives import pieces
from hvd_adam.distributed.gradients.header import square_of, sums_are_finite
from hvd_adam.errors import JobError
from hvd_adam.optim.parameter_store import ParameterStore

WIDTH = 64


@contextmanager
def recorded_sections():
    """Yields a list of the sections that are updated while others are in flight."""
    found, update_sections = [], ParameterStore.update_sections

    def recorded(store, groups, ready):
        def noted():
            for section, within in ready:
                found.append(section)
                yield section, within

        update_sections(store, groups, noted())

    ParameterStore.update_sections = recorded
    try:
        yield found
    finally:
        ParameterStore.update_sections = update_sections


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 4)).to(dtype)


def make_optimizer(model, kind=Adam, adam=None, bucket_bytes=4 * WIDTH * WIDTH, amsgrad_of=None, **options):
    """Distributes an optimizer; by default each weight of `make_model` has a bucket of its own.

    With `amsgrad_of` every parameter has a group. Those of the first and last layer (0), or of the second (1), use
    AMSGrad.
    """
    groups = model.parameters()
    if amsgrad_of is not None:
        groups = [{"params": [p], "amsgrad": i // 2 % 2 == amsgrad_of} for i, p in enumerate(model.parameters())]
    optimizer = kind(groups, lr=1e-2, implementation="fused", **(adam or {}))
    return distribute(optimizer, model, bucket_mib=bucket_bytes / 2**20, **options)


def backward(model, cluster, seed):
    generator = torch.Generator().manual_seed(1000 * seed + cluster.rank)
    inputs = torch.randn(8, WIDTH, generator=generator).to(next(model.parameters()).dtype)
    model(inputs).square().mean().backward()


def train(model, optimizer, cluster, passes=4):
    for seed in range(passes):
        optimizer.zero_grad()
        backward(model, cluster, seed)
        optimizer.step()


def compared(cluster, passes=4, dtype=torch.float32, **options):
    """Trains with updates behind the reductions and with updates that wait. Returns the sections of the former."""
    waiting, behind = make_model(dtype), make_model(dtype)
    expected = make_optimizer(waiting, **options)
    train(waiting, expected, cluster, passes)
    with recorded_sections() as sections:
        optimizer = make_optimizer(behind, defer_averaging=True, **options)
        train(behind, optimizer, cluster, passes)
    assert everything(behind, optimizer) == everything(waiting, expected)
    feedback = [o.error_feedback and o.error_feedback.state_dict_on_root() for o in (optimizer, expected)]
    assert digest(feedback[0]) == digest(feedback[1])
    assert same_everywhere(digest(behind.state_dict()))
    return sections


@on_ranks(1, 2, 3)
@each_strategy
@pytest.mark.parametrize("state_format", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_update_behind_the_reductions_has_the_bits_of_one_that_waits(
    cluster, strategy, state_format, accumulate
):
    adam = {"state_format": state_format}
    sections = compared(cluster, strategy=strategy, adam=adam, accumulate=accumulate)
    updates = 4 // accumulate
    # The bucket of the first parameters, 0, is sent last.
    assert sections == ([] if cluster.size == 1 else [3, 2, 1, 0] * updates)


def send_in_pieces(patch, nbytes):
    for name in ("ALLREDUCE_BYTES", "PAIR_BYTES"):
        patch.setattr(pieces, name, nbytes)


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("rounding", [None, "float32", "bfloat16", "8bit", "stochastic_rounding"])
@pytest.mark.parametrize("message_bytes", [4096, 3000])  # whole blocks, and parts that end within one
@pytest.mark.parametrize("bucket_bytes", [4 * WIDTH * WIDTH, 2**20])  # one weight, or the whole model
def test_parts_of_a_bucket_that_are_updated_as_they_arrive_have_the_same_bits(
    cluster, strategy, rounding, message_bytes, bucket_bytes
):
    dtype = torch.float32 if rounding in (None, "float32", "bfloat16", "8bit") else torch.bfloat16
    adam = {rounding: True} if dtype == torch.bfloat16 else {"state_format": rounding or "float32"}
    adam |= {} if rounding else {"weight_decay": 0.1, "amsgrad": True}
    with pytest.MonkeyPatch.context() as patch:
        send_in_pieces(patch, message_bytes)
        sections = compared(cluster, strategy=strategy, dtype=dtype, adam=adam, bucket_bytes=bucket_bytes)
    parts = sections.count(0) / 4  # in each of 4 updates
    elements = WIDTH * WIDTH if bucket_bytes < 2**20 else 2 * (WIDTH * WIDTH + WIDTH) + 4 * WIDTH + 4
    assert parts == 1 if dtype == torch.bfloat16 else parts >= 4 * elements // message_bytes


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("amsgrad_of", [0, 1])  # the layers that do; see `make_optimizer`
def test_parts_of_parameters_with_and_without_amsgrad_have_the_same_bits(cluster, strategy, amsgrad_of):
    with pytest.MonkeyPatch.context() as patch:
        send_in_pieces(patch, 4096)
        assert compared(cluster, strategy=strategy, bucket_bytes=2**20, amsgrad_of=amsgrad_of)


@on_ranks(2)
def test_the_noise_scale_of_buckets_that_arrive_in_parts_is_that_of_whole_ones(cluster):
    scales = []
    for message_bytes in (3000, 2**20):
        model = make_model()
        with pytest.MonkeyPatch.context() as patch:
            send_in_pieces(patch, message_bytes)
            # The form "adam" divides by √v̂ of before the update.
            noise = {"noise_scale": 1, "noise_scale_form": "adam", "defer_averaging": True}
            optimizer = make_optimizer(model, **noise)
            train(model, optimizer, cluster, passes=20)
        scales.append(optimizer.noise.estimate())
    assert scales[0].value < math.inf and scales[0] == pytest.approx(scales[1], rel=1e-3), scales


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("compression", ["fp16", "bf16", "int8", "int4"])
def test_each_compression_has_the_same_bits_and_residuals(cluster, strategy, compression):
    sections = compared(cluster, strategy=strategy, compression=compression)
    assert bool(sections) is (compression in ("fp16", "bf16"))  # codes: see `Reducer`


@on_ranks(2)
@each_strategy
def test_updates_are_behind_the_reductions_again_once_codes_are_given_up(cluster, strategy):
    trained = []
    with recorded_sections() as sections:
        for deferred in (False, True):
            model = make_model()
            options = {"strategy": strategy, "compression": "auto:any", "defer_averaging": deferred}
            optimizer = make_optimizer(model, **options)
            for compression in ("int8", "none", "int4"):
                optimizer.use_compression(compression)
                before = len(sections)
                train(model, optimizer, cluster, passes=2)
                assert (len(sections) > before) is (deferred and compression == "none")
            trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]


@on_ranks(2)
@pytest.mark.parametrize("rounding", ["master_weights", "stochastic_rounding"])
def test_half_precision_has_the_same_bits(cluster, rounding):
    assert compared(cluster, dtype=torch.bfloat16, adam={rounding: True})


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_of_the_last_bucket_that_is_not_finite_leaves_all_buckets_unchanged(cluster, strategy, value):
    model = make_model()
    optimizer = make_optimizer(model, strategy=strategy, defer_averaging=True)
    train(model, optimizer, cluster, passes=1)
    before = everything(model, optimizer)
    optimizer.zero_grad()
    hook = model[0].weight.register_hook(lambda grad: grad.fill_(value if cluster.rank else 1.0))
    backward(model, cluster, 1)
    hook.remove()
    optimizer.step()
    assert optimizer.skipped and optimizer.skipped_updates == 1
    assert everything(model, optimizer) == before
    train(model, optimizer, cluster, passes=1)
    assert not optimizer.skipped and everything(model, optimizer) != before


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("compression", ["int8", "int4"])
@pytest.mark.parametrize(("place", "value"), [(0, math.nan), (-1, math.nan), (0, 1e38), (-1, 1e38)])
def test_a_gradient_in_any_part_that_codes_cannot_add_leaves_the_model(
    cluster, strategy, compression, place, value
):
    """A rank sends codes of one part only, and adds the other itself. Twice 1e38 is finite, its square is not."""
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = make_optimizer(model, strategy=strategy, compression=compression, defer_averaging=True)
    before = digest(model.state_dict())
    gradient = torch.ones(64, 64)
    gradient.view(-1)[place] = value
    with recorded_sections() as sections:
        (model.weight * (gradient if cluster.rank else 1.0)).sum().backward()
        optimizer.step()
    assert not sections
    if math.isnan(value):
        assert optimizer.skipped and digest(model.state_dict()) == before


@on_ranks(2)
@pytest.mark.parametrize(("compression", "large"), [("none", 1e19), ("fp16", 6e4)])
def test_gradients_whose_sum_might_overflow_wait_for_all(cluster, compression, large):
    """6e4 is a float16, and so is the mean on two ranks."""
    trained = []
    for deferred in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, compression=compression, defer_averaging=deferred)
        model[0].weight.register_hook(lambda grad: grad.fill_(large))
        with recorded_sections() as sections:
            train(model, optimizer, cluster, passes=2)
        assert not sections and not optimizer.skipped
        trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]


@on_ranks(2)
@each_strategy
def test_ranks_that_have_parted_update_nothing(cluster, strategy):
    model = make_model()
    optimizer = make_optimizer(model, strategy=strategy, defer_averaging=True)
    before = digest(model.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1 + cluster.rank
    backward(model, cluster, 0)
    with pytest.raises(JobError, match="lr of parameter group 0"):
        optimizer.step()
    assert digest(model.state_dict()) == before


@on_ranks(2)
def test_a_parameter_that_no_rank_uses_does_not_move(cluster):
    model = make_model()
    model.unused = torch.nn.Parameter(torch.ones(WIDTH, WIDTH))
    optimizer = make_optimizer(model, adam={"weight_decay": 0.1}, defer_averaging=True)
    with recorded_sections() as sections:
        train(model, optimizer, cluster, passes=2)
    assert sections
    assert model.unused.grad is None and (model.unused == 1).all()
    assert optimizer.state[model.unused]["step"] == 0


@on_ranks(2)
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"loss_scaler": "GradScaler"}])
def test_clipping_and_loss_scaling_wait_for_all_gradients(cluster, options):
    if "loss_scaler" in options:
        options = {"loss_scaler": torch.amp.GradScaler("cpu", init_scale=4.0)}
    model = make_model()
    optimizer = make_optimizer(model, defer_averaging=True, **options)
    with recorded_sections() as sections:
        train(model, optimizer, cluster, passes=2)
    assert not sections and optimizer.grad_norm is not None


class Halved(Adam):
    """Changes gradients in `step`, which must be the mean by then."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.clamp_(-1e-3, 1e-3)
        return super().step(closure)


@on_ranks(2)
def test_the_step_of_a_derived_class_sees_averaged_gradients(cluster):
    trained = []
    for deferred in (False, True):
        model = make_model()
        optimizer = make_optimizer(model, kind=Halved, defer_averaging=deferred)
        with recorded_sections() as sections:
            train(model, optimizer, cluster)
        assert not sections
        trained.append(everything(model, optimizer))
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("value", "compression", "expected"),
    [
        (1.0, "none", True),
        (1e17, "bf16", True),
        (2e18, "none", False),
        (3e38, "none", False),
        (1e4, "fp16", True),
        (1.6e4, "fp16", False),
        (math.inf, "none", False),
        (-math.inf, "none", False),
        (math.nan, "none", False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_are_known_to_be_finite_if_gradients_are_small(value, compression, expected, dtype):
    gradients = torch.zeros(100, dtype=dtype)
    gradients[63] = value
    assert sums_are_finite(square_of(gradients), compression, ranks=2) is expected


@on_ranks(2)
@pytest.mark.parametrize("compression", ["none", "bf16", "int8", "int4"])
def test_a_gradient_that_a_compression_rounds_beyond_float16_skips_the_update(cluster, compression):
    model = torch.nn.Linear(64, 64, bias=False).half()
    adam = Adam(model.parameters(), implementation="fused")
    optimizer = distribute(adam, model, compression=compression, defer_averaging=True)
    gradient = torch.ones(64, 64, dtype=torch.float16)
    gradient[0, 0] = 65504  # the largest float16, in bfloat16 65536
    (model.weight * gradient).sum().backward()
    optimizer.step()
    assert model.weight.isfinite().all()
    assert bool(optimizer.skipped) is not bool(model.weight.grad.isfinite().all())


@on_ranks(2)
def test_a_rank_that_broadcasts_while_another_steps_ends_the_job(cluster):
    from horovod.common.exceptions import HorovodInternalError

    model = make_model()
    optimizer = distribute(Adam(model.parameters(), implementation="fused"), model, defer_averaging=True)
    before = digest(model.state_dict())
    with pytest.raises(HorovodInternalError, match=r"some ranks wait for gradients|this rank is in broadcast\(\)"):
        if cluster.rank == 0:
            backward(model, cluster, 0)
            optimizer.step()
        else:
            optimizer.broadcast()
    assert digest(model.state_dict()) == before
