"""`distribute` on GPUs: one rank through NCCL, two on one GPU through the host's memory or on two through NCCL.

Hazards: collectives that NCCL, or Horovod's build for it, does not have; streams that are not synchronized; a
skipped update that host and device count differently; hidden synchronizations in the step of one rank; hooks that
a compiled model does not call.
"""

import os
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.skipping import check_skipping

from hvd_adam import Adam, distribute
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Layout
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.gradients.reducer import Reducer
from hvd_adam.distributed.noise.meter import NoiseMeter

# Two ranks can share a GPU only with a Horovod built without NCCL; tests/gpu/run.sh builds one.
THROUGH_HOST = "HVD_ADAM_THROUGH_HOST" in os.environ
needs_two = pytest.mark.skipif(
    not THROUGH_HOST and torch.cuda.device_count() < 2,
    reason="NCCL needs a GPU for each rank: two, or HVD_ADAM_THROUGH_HOST (see tests/gpu/run.sh)",
)
needs_nccl = pytest.mark.skipif(THROUGH_HOST, reason="this Horovod sends tensors through the host's memory")
TWO_RANKS = {"HVD_ADAM_TEST_DEVICE": "cpu"} if THROUGH_HOST else {}


def device():
    return torch.device("cuda", torch.cuda.current_device())


def network():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(20, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3))
    return torch.nn.Sequential(*layers).to(device())


def made(**options):
    model = network()
    return model, distribute(Adam(model.parameters(), lr=1e-2), model, **options)


def update(model, optimizer, seed, scaler=None):
    """Makes one update on 64 samples generated from the seed."""
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = model(torch.randn(64, 20, device=device())).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()
    optimizer.step()


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_nccl
@on_ranks(1)
def test_nccl_is_built_in_and_its_collectives_work_on_one_rank(cluster):
    hvd = horovod()
    assert hvd.nccl_built()
    assert cluster.device.type == "cuda"
    sent = torch.arange(6.0, device=cluster.device)
    for result in (
        hvd.allreduce(sent, op=hvd.Sum, name="a"),
        hvd.grouped_allreduce([sent.clone()], op=hvd.Sum, name="b")[0],
        hvd.allgather(sent, name="c"),
        hvd.broadcast(sent, 0, name="d"),
        hvd.alltoall(sent, name="e"),
        hvd.reducescatter(sent, op=hvd.Sum, name="f"),
    ):
        assert torch.equal(result, sent)
        assert result.is_cuda


@needs_nccl
@on_ranks(1)
def test_buckets_reduced_by_nccl_on_one_rank_are_unchanged(cluster):
    for compression, scatter in product(("none", "fp16", "bf16"), (False, True)):
        shapes = ((300, 70), (7,), (1000, 33), (5, 5))
        params = [torch.nn.Parameter(torch.zeros(shape, device=cluster.device)) for shape in shapes]
        buffer = GradientBuffer(params, Layout.of(params, 60_000, 1, control=2))
        assert len(buffer.layout.buckets) > 1
        noise = NoiseMeter(None, rank=0, ranks=1, accumulate=1)
        reducer = Reducer([buffer], f"test.{compression}.{scatter}", compression, 1, scatter, noise=noise)
        sent = [torch.randint(-99, 99, shape, device=cluster.device).float() for shape in shapes]
        for p, gradient in zip(params[:-1], sent, strict=False):
            p.grad = gradient.clone()
        reducer.send_rest(torch.tensor([1.0, 2.0]))
        reduced = reducer.finish(torch.tensor([1.0, 2.0]), add=True)
        assert reduced.message == [1.0, 2.0]
        assert reduced.total is not None and reduced.total.isfinite()
        assert params[-1].grad is None  # no rank has used it
        for p, gradient in zip(params[:-1], sent, strict=False):
            assert torch.equal(reducer.place(p), gradient), (compression, scatter)  # whole numbers below 2⁸


@on_ranks(1)
def test_the_step_of_one_rank_does_not_synchronize_with_the_device(cluster):
    for options in ({}, {"max_grad_norm": 0.1}, {"accumulate": 2}, {"loss_scaler": torch.amp.GradScaler("cuda")}):
        model, optimizer = made(**options)
        scaler = options.get("loss_scaler")
        for step in range(4):
            for _ in range(options.get("accumulate", 1)):
                optimizer.zero_grad()
                loss = model(torch.randn(16, 20, device=cluster.device)).square().mean()
                (loss if scaler is None else scaler.scale(loss)).backward()
                if step:
                    with no_waiting():
                        optimizer.step()
                else:
                    optimizer.step()  # compiles, and builds the layout
        assert optimizer.skipped_updates == 0
        assert {entry["step"].item() for entry in optimizer.state_dict()["state"].values()} == {4}


@on_ranks(1)
def test_a_skipped_update_changes_no_tensor_and_is_counted_once(cluster):
    model, optimizer = made()
    update(model, optimizer, 0)
    before = [t.clone() for t in optimizer.state_dict()["state"][0].values()]
    weights = [p.detach().clone() for p in model.parameters()]
    for bad in (float("nan"), float("inf")):
        optimizer.zero_grad()
        (model(torch.randn(16, 20, device=cluster.device)).sum() * bad).backward()
        optimizer.step()
        assert optimizer.skipped.item()
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(map(torch.equal, before, optimizer.state_dict()["state"][0].values()))
    assert optimizer.skipped_updates == 2
    update(model, optimizer, 1)
    assert optimizer.skipped_updates == 2
    assert optimizer.state_dict()["state"][0]["step"].item() == 2


@on_ranks(1)
def test_a_parameter_without_elements_is_no_obstacle_to_the_check_for_finite_gradients(cluster):
    model = torch.nn.ParameterList(torch.ones(n, device=device()) for n in (0, 5))
    optimizer = distribute(Adam(model.parameters()), model)
    for factor in (1.0, float("nan")):
        optimizer.zero_grad()
        (sum(p.sum() for p in model) * factor).backward()
        optimizer.step()
        assert bool(optimizer.skipped) == (factor != 1.0)


def assert_same_moments(optimizer, other):
    """Not the weights: where a gradient is next to nothing, Adam makes a whole step of its rounding."""
    pairs = zip(optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True)
    for ours, theirs in pairs:
        assert ours["step"] == theirs["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            bound = 2**-16 * theirs[name].abs().max()  # some roundings of sums of 64 products
            assert ((ours[name] - theirs[name]).abs() <= bound).all(), name


@on_ranks(1)
def test_clipping_and_loss_scaling_equal_those_of_pytorch(cluster):
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    model, optimizer = made(max_grad_norm=0.05, loss_scaler=scaler)
    plain = network()
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2)
    for seed in range(3):
        plain.load_state_dict(model.state_dict())
        update(model, optimizer, seed, scaler)
        torch.manual_seed(seed)
        reference.zero_grad()
        plain(torch.randn(64, 20, device=device())).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        assert norm > 0.05
        reference.step()
    assert_same_moments(optimizer, reference)


@on_ranks(1)
def test_a_compiled_model_trains_like_an_eager_one(cluster):
    model, optimizer = made()
    other, its_optimizer = made()
    compiled = torch.compile(other)
    for seed in range(3):
        other.load_state_dict(model.state_dict())
        update(model, optimizer, seed)
        update(compiled, its_optimizer, seed)
    assert_same_moments(its_optimizer, optimizer)


@needs_two
@on_ranks(2, **TWO_RANKS)
def test_two_ranks_make_the_update_of_one(cluster):
    for options in (
        {},
        {"strategy": "sharded"},
        {"compression": "bf16"},
        {"compression": "fp16"},
        {"max_grad_norm": 0.05, "accumulate": 2},
    ):
        model, optimizer = made(**options)
        plain = network()
        for seed in range(3):
            plain.load_state_dict(model.state_dict())
            torch.manual_seed(seed)
            images = torch.randn(64, 20, device=device())
            plain.zero_grad()
            plain(images).square().mean().backward()
            for number in range(options.get("accumulate", 1)):
                if number:
                    optimizer.step()  # counts a micro-batch
                optimizer.zero_grad()
                model(images.chunk(2)[cluster.rank]).square().mean().backward()
            optimizer.synchronize()
            # Half-precision gradients are rounded twice, with a relative error of 2⁻⁹ or 2⁻¹².
            rounding = 2**-8 if "compression" in options else 2**-18
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                bound = 4 * rounding * theirs.grad.abs().max()
                assert ((ours.grad - theirs.grad).abs() <= bound).all(), options
            optimizer.step()
            everyones = horovod().allgather_object([p.detach().cpu() for p in model.parameters()])
            assert all(map(torch.equal, everyones[0], everyones[1])), options
            assert not torch.equal(model[0].weight, plain[0].weight)


@needs_two
@on_ranks(2, **TWO_RANKS)
def test_a_nonfinite_gradient_of_one_rank_is_skipped_by_both(cluster):
    torch.set_default_device(device())
    try:
        check_skipping(cluster, {})
        check_skipping(cluster, {"strategy": "sharded", "max_grad_norm": 1.0})
    finally:
        torch.set_default_device("cpu")
