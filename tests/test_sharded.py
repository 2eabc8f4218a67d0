"""The sharded strategy: each rank keeps, and updates, one N-th, and nobody can tell but by the memory.

Hazards: parts that overlap, leave gaps or go to the wrong rank where counts do not divide, tensors are smaller
than the number of ranks, empty or 0-dimensional; groups and dtypes that share a buffer; a norm of one rank's
part alone; state that is whole on one rank and a part on another (loading, broadcasting, adding groups, moving
the model) or that a loaded one of another kind leaves behind; a state dictionary that another optimizer, strategy
or number of ranks cannot go on from; either way of exchanging parts.

Gradients are multiples of 1/8 of size 1 and below: their sums over ranks and micro-batches are exact in every
dtype and order, so that only the update itself is rounded.
"""

import copy
import json
import math
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from helpers.exchanges import scattering
from helpers.on_ranks import launch, on_ranks
from helpers.small_training import (
    batches,
    digest,
    everything,
    largest_difference,
    same_everywhere,
    share,
    small_model,
    train,
    train_alone,
    whole_state,
)

from hvd_adam import Adam, distribute
from hvd_adam.errors import UserError

ODD_SHAPES = ((7, 13), (1,), (), (0,), (101,), (2,), (3, 1, 5))
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def parameter_list(shapes=ODD_SHAPES, dtype=torch.float64):
    """A model of nothing but parameters, the same on every rank; dtypes go round where there are several."""
    generator = torch.Generator().manual_seed(0)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    return torch.nn.ParameterList(
        torch.nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        )
        for i, shape in enumerate(shapes)
    )


def gradients(model, step, part):
    """What rank or micro-batch `part` contributes to a step; every rank can tell what the others do."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    return [torch.randint(-8, 9, p.shape, generator=generator).double() / 8 for p in model.parameters()]


def step_together(model, optimizer, cluster, first, last, micro_batches=1, absent=(), scaler=None):
    """Makes steps [first, last), this rank with its own gradients, but none for parameters in `absent`."""
    for step in range(first, last):
        for micro_batch in range(micro_batches):
            optimizer.zero_grad()
            mine = gradients(model, step, cluster.rank * micro_batches + micro_batch)
            pairs = list(zip(model.parameters(), mine, strict=True))
            used = [(p, g) for i, (p, g) in enumerate(pairs) if i not in absent]
            if used:
                loss = sum((p * g.to(p.dtype)).sum().double() for p, g in used)
                (scaler.scale(loss) if scaler else loss).backward()
            optimizer.step()


def step_alone(model, optimizer, parts, first, last, clip=None, absent=()):
    """The oracle of `step_together`: the mean of all parts' gradients, in one process. Returns the last norm."""
    for step in range(first, last):
        means = [sum(g) / parts for g in zip(*(gradients(model, step, i) for i in range(parts)), strict=True)]
        for i, (p, g) in enumerate(zip(model.parameters(), means, strict=True)):
            p.grad = None if i in absent else g.to(p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
    return norm.item()


def sharded(model, *, adam=None, **options):
    """A fresh sharded optimizer of the model."""
    return distribute(Adam(model.parameters(), **(adam or OPTIONS)), model, strategy="sharded", **options)


def stock(model, **options):
    return torch.optim.Adam(model.parameters(), foreach=False, **(options or OPTIONS))


@on_ranks(3)
def test_rank_0_alone_gets_the_whole_state_to_save(cluster):
    optimizer = trained_sharded()
    whole, on_root = optimizer.state_dict(), optimizer.state_dict_on_root()
    assert (on_root is None) == (cluster.rank > 0)
    if on_root is not None:
        assert on_root["param_groups"] == whole["param_groups"]
        for number, state in whole["state"].items():
            assert all(torch.equal(value, on_root["state"][number][name]) for name, value in state.items())
    with scattering():
        assert (optimizer.state_dict_on_root() is None) == (cluster.rank > 0)


def trained_sharded():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    optimizer = distribute(Adam(model.parameters()), model, strategy="sharded")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 7)).square().sum().backward()
        optimizer.step()
    return optimizer


def both_ways():
    """For loops: once by what a CPU does, once by what a GPU does.

    The latter under MPI alone: after a reduce-scatter of Horovod 0.28.1's Gloo the next large broadcast hangs.
    """
    yield "in place"
    if hvd.mpi_enabled():
        with scattering():
            yield "scattering"


def assert_close(model, other, tolerance=1e-12):
    """In 20 steps of float64, some 30 roundings each, of numbers of size 1: below 1e-12."""
    for i, (p, q) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


def assert_same_state(state, other, tolerance=1e-12):
    """State dictionaries with the same keys, shapes, dtypes and, to rounding, numbers."""
    assert state.keys() == other.keys()
    for i in state:
        assert state[i].keys() == other[i].keys(), i
        for key in state[i]:
            torch.testing.assert_close(state[i][key], other[i][key], rtol=tolerance, atol=tolerance)


def kept_bytes(optimizer):
    """The memory that the state takes on this rank, by the storages that it lies in."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
    }
    return sum(storages.values())


# One N-th each.


def assert_one_nth_is_kept(cluster):
    for adam, tensors in (({}, 2), ({"amsgrad": True}, 3)):
        model = parameter_list(((300, 400), (401,), (1,), (7, 11, 13)), torch.float32)
        total = 4 * tensors * sum(p.numel() for p in model.parameters())
        optimizer = sharded(model, adam=adam)
        for _ in range(2):  # before and after a step
            assert abs(kept_bytes(optimizer) - total / cluster.size) < 0.01 * total / cluster.size
            step_together(model, optimizer, cluster, 0, 1)
        # No element is kept twice or not at all.
        held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
        assert sum(hvd.allgather_object(held)) == sum(p.numel() for p in model.parameters())
        assert all(state["exp_avg"].dim() == 1 for state in optimizer.state.values())


@on_ranks(2, "mpi")
def test_two_ranks_keep_half_of_the_state_each(cluster):
    assert_one_nth_is_kept(cluster)


@on_ranks(3)
def test_three_ranks_keep_a_third_of_the_state_each(cluster):
    assert_one_nth_is_kept(cluster)


@on_ranks(4, "mpi")
def test_four_ranks_keep_a_quarter_of_the_state_each(cluster):
    assert_one_nth_is_kept(cluster)


# The same run.


def assert_the_losses_of_the_default_strategy(cluster):
    def losses(strategy):
        model = small_model(torch.float32)
        optimizer = distribute(Adam(model.parameters(), lr=1e-2), model, strategy=strategy)
        curve = []
        for batch in batches(50, 24, torch.float32):
            ((inputs, targets),) = share(batch, cluster)
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return torch.tensor(curve, dtype=torch.float64)

    expected = losses("allreduce")
    for way in both_ways():
        assert torch.all((losses("sharded") - expected).abs() <= 1e-5 * expected), way


@on_ranks(2)
def test_losses_are_the_default_strategys_on_two_ranks(cluster):
    assert_the_losses_of_the_default_strategy(cluster)


@on_ranks(3)
def test_losses_are_the_default_strategys_on_three_ranks(cluster):
    assert_the_losses_of_the_default_strategy(cluster)


@on_ranks(4, "mpi")
def test_losses_are_the_default_strategys_on_four_ranks(cluster):
    assert_the_losses_of_the_default_strategy(cluster)


def assert_odd_shapes_train_like_one_process(cluster):
    for way in both_ways():
        for shapes in (ODD_SHAPES, ((),), ((1,),), ((cluster.size * 16,), (3,)), ((5, 1), (0,))):
            for options in ({}, {"amsgrad": True})[: 2 if shapes is ODD_SHAPES else 1]:
                model, oracle = parameter_list(shapes), parameter_list(shapes)
                optimizer = sharded(model, adam={**OPTIONS, **options})
                reference = stock(oracle, **OPTIONS, **options)
                step_together(model, optimizer, cluster, 0, 5)
                step_alone(oracle, reference, cluster.size, 0, 5)
                assert_close(model, oracle)
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
                assert same_everywhere(everything(model, optimizer)), (way, shapes, options)


@on_ranks(3, "mpi")
def test_odd_and_tiny_and_empty_parameters_train_like_one_process_on_three_ranks(cluster):
    assert_odd_shapes_train_like_one_process(cluster)


@on_ranks(3)
def test_odd_and_tiny_and_empty_parameters_train_like_one_process_on_three_ranks_under_gloo(cluster):
    assert_odd_shapes_train_like_one_process(cluster)


@on_ranks(4, "mpi")
def test_odd_and_tiny_and_empty_parameters_train_like_one_process_on_four_ranks(cluster):
    assert_odd_shapes_train_like_one_process(cluster)


@on_ranks(3, "mpi")
def test_many_buckets_train_like_one_process(cluster):
    shapes = ((500, 1201), (11,), (1, 600_001), (3,))  # 4.8 MB of float64 each of the large: buckets of 8 MiB
    for way in both_ways():
        model, oracle = parameter_list(shapes), parameter_list(shapes)
        optimizer = sharded(model, adam={**OPTIONS, "implementation": "foreach"}, max_grad_norm=1.0)
        step_together(model, optimizer, cluster, 0, 2)
        step_alone(oracle, stock(oracle), cluster.size, 0, 2, clip=1.0)
        # A norm of a million numbers, summed in another order: 1e6 ulps at the very most, √1e6 in practice.
        assert_close(model, oracle, 1e-11)
        assert same_everywhere(digest(model.state_dict())), way


@on_ranks(3)
def test_groups_with_other_options_keep_theirs(cluster):
    def groups(model):
        first, second, third, *rest = model.parameters()
        return [
            {"params": [first], "lr": 0.1, "amsgrad": True},
            {"params": [second, third], "betas": (0.5, 0.6), "weight_decay": 0.0},
            {"params": rest, "maximize": True, "eps": 1e-3},
        ]

    for way in both_ways():
        model, oracle = parameter_list(), parameter_list()
        adam = Adam(groups(model), **OPTIONS)
        adam.param_groups[1]["implementation"] = "reference"
        optimizer = distribute(adam, model, strategy="sharded", max_grad_norm=0.5)
        reference = torch.optim.Adam(groups(oracle), foreach=False, **OPTIONS)
        step_together(model, optimizer, cluster, 0, 5)
        step_alone(oracle, reference, cluster.size, 0, 5, clip=0.5)
        assert_close(model, oracle)
        assert same_everywhere(everything(model, optimizer)), way
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])


@on_ranks(3, "mpi")
def test_dtypes_train_beside_each_other_with_and_without_master_weights(cluster):
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    for options in ({}, {"master_weights": True}, {"amsgrad": True, "master_weights": True}):
        for way in both_ways():
            model, default = parameter_list(dtype=dtypes), parameter_list(dtype=dtypes)
            optimizer = sharded(model, adam={**OPTIONS, **options})
            other = distribute(Adam(default.parameters(), **OPTIONS, **options), default)
            for either, its in ((model, optimizer), (default, other)):
                step_together(either, its, cluster, 0, 5)
            for i, (p, q) in enumerate(zip(model.parameters(), default.parameters(), strict=True)):
                # The same operations on the same numbers, vectorised at other places: an ulp or two a step.
                torch.testing.assert_close(p, q, rtol=10 * torch.finfo(p.dtype).eps, atol=1e-6)
                assert ("master_param" in whole_state(optimizer, p)) == (
                    p.dtype == torch.bfloat16 and "master_weights" in options
                ), (i, options)
            assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
            mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
            for i in mine:
                kinds = [{key: (t.shape, t.dtype) for key, t in whole[i].items()} for whole in (mine, theirs)]
                assert kinds[0] == kinds[1], i
            assert same_everywhere(everything(model, optimizer)), (way, options)


@on_ranks(3)
def test_stochastically_rounded_parameters_are_alike_on_all_ranks(cluster):
    for way in both_ways():
        model = parameter_list(dtype=torch.bfloat16)
        optimizer = sharded(model, adam={**OPTIONS, "stochastic_rounding": True})
        step_together(model, optimizer, cluster, 0, 5)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3, "mpi")
def test_channels_last_weights_keep_their_order_of_memory(cluster):
    def convolution():
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 5, 3).double().to(memory_format=torch.channels_last)

    for way in both_ways():
        model, oracle = convolution(), convolution()
        optimizer, reference = sharded(model), stock(oracle)
        step_together(model, optimizer, cluster, 0, 3)
        step_alone(oracle, reference, cluster.size, 0, 3)
        assert_close(model, oracle)
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert model.weight.is_contiguous(memory_format=torch.channels_last), way


# Clipping, accumulation, compression, loss scaling.


def assert_clipping_by_the_true_norm(cluster):
    for way in both_ways():
        for micro_batches in (1, 3):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded(model, max_grad_norm=0.5, accumulate=micro_batches)
            step_together(model, optimizer, cluster, 0, 4, micro_batches)
            norm = step_alone(oracle, stock(oracle), cluster.size * micro_batches, 0, 4, clip=0.5)
            assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), (way, micro_batches)
            assert optimizer.grad_norm.dim() == 0
            assert_close(model, oracle)


@on_ranks(3, "mpi")
def test_three_ranks_clip_by_the_norm_of_all_parts(cluster):
    assert_clipping_by_the_true_norm(cluster)


@on_ranks(4, "mpi")
def test_four_ranks_clip_by_the_norm_of_all_parts(cluster):
    assert_clipping_by_the_true_norm(cluster)


@on_ranks(3)
def test_a_norm_over_several_dtypes_is_that_of_all_of_them(cluster):
    model, oracle = (parameter_list(dtype=(torch.float32, torch.float64)) for _ in range(2))
    optimizer = sharded(model, max_grad_norm=0.5)
    step_together(model, optimizer, cluster, 0, 1)
    norm = step_alone(oracle.double(), stock(oracle), cluster.size, 0, 1)
    # Of 120 exact squares; the root is rounded to float32.
    assert optimizer.grad_norm.item() == pytest.approx(norm, rel=2**-22)


@on_ranks(0)
def test_one_rank_clips_what_is_flat_and_what_is_not(cluster):
    for implementation in ("foreach", "fused"):
        model, oracle = parameter_list(), parameter_list()
        optimizer = sharded(model, adam={**OPTIONS, "implementation": implementation}, max_grad_norm=0.5)
        step_together(model, optimizer, cluster, 0, 4)
        norm = step_alone(oracle, stock(oracle), 1, 0, 4, clip=0.5)
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), implementation
        assert_close(model, oracle)
        assert_same_state(optimizer.state_dict()["state"], stock_state(oracle, 1, 4, clip=0.5))


def stock_state(model, parts, steps, clip=None):
    """The state that PyTorch's Adam has after so many steps of a fresh model."""
    fresh = parameter_list([p.shape for p in model.parameters()])
    optimizer = stock(fresh)
    step_alone(fresh, optimizer, parts, 0, steps, clip)
    return optimizer.state_dict()["state"]


@on_ranks(3, "mpi")
def test_synchronize_gives_every_rank_the_whole_mean(cluster):
    for way in both_ways():
        for options in ({}, {"max_grad_norm": 0.5}, {"compression": "fp16"}, {"compression": "bf16"}):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded(model, **options)
            sum(
                (p * g).sum() for p, g in zip(model.parameters(), gradients(model, 0, cluster.rank), strict=True)
            ).backward()
            optimizer.synchronize()
            optimizer.synchronize()  # once more changes nothing
            means = [
                sum(g) / cluster.size
                for g in zip(*(gradients(model, 0, i) for i in range(cluster.size)), strict=True)
            ]
            tolerance = {"fp16": 2.0**-9, "bf16": 2.0**-7}.get(options.get("compression"), 1e-15)
            for p, mean in zip(model.parameters(), means, strict=True):
                torch.testing.assert_close(p.grad, mean, rtol=tolerance, atol=tolerance)
            assert same_everywhere(digest([p.grad for p in model.parameters()])), (way, options)
            if "compression" not in options:
                optimizer.step()
                step_alone(oracle, stock(oracle), cluster.size, 0, 1, clip=options.get("max_grad_norm"))
                assert_close(model, oracle)


@on_ranks(3, "mpi")
def test_gradients_changed_after_synchronize_are_what_is_clipped_and_stepped(cluster):
    def double_in_place(p):
        p.grad.mul_(2)

    def double(p):
        p.grad = 2 * p.grad

    for way in both_ways():
        for change in (double_in_place, double):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded(model, max_grad_norm=0.5), stock(oracle)
            sum(
                (p * g).sum() for p, g in zip(model.parameters(), gradients(model, 0, cluster.rank), strict=True)
            ).backward()
            optimizer.synchronize()
            means = zip(*(gradients(model, 0, i) for i in range(cluster.size)), strict=True)
            for p, q, parts in zip(model.parameters(), oracle.parameters(), means, strict=True):
                change(p)
                q.grad = 2 * sum(parts) / cluster.size
            optimizer.step()
            norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5).item()
            reference.step()
            assert optimizer.grad_norm.item() == pytest.approx(norm, rel=1e-14), (way, change)
            assert_close(model, oracle)


@on_ranks(3, "mpi")
def test_compressed_gradients_of_micro_batches_train_within_their_rounding(cluster):
    for way in both_ways():
        for compression, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
            model, oracle = parameter_list(), parameter_list()
            optimizer = sharded(model, adam={"lr": 1e-2, "eps": 1.0}, compression=compression, accumulate=2)
            step_together(model, optimizer, cluster, 0, 4, micro_batches=2)
            step_alone(oracle, stock(oracle, lr=1e-2, eps=1.0), 2 * cluster.size, 0, 4)
            # Parts of size 2 and below are rounded once each and their mean once more: 4 · unit. With ε = 1 an
            # update has at most twice the error of the gradients so far, times lr; there are 4.
            assert_close(model, oracle, 4 * 1e-2 * 2 * 4 * unit)
            assert same_everywhere(everything(model, optimizer)), (way, compression)


@on_ranks(3, "mpi")
def test_an_overflow_on_one_rank_skips_the_update_on_all(cluster):
    for way in both_ways():
        for clip in (None, 0.5):
            model, oracle = parameter_list(), parameter_list()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10 * (1 + cluster.rank))
            optimizer = sharded(model, max_grad_norm=clip, accumulate=2, loss_scaler=scaler)
            reference = stock(oracle)
            step_together(model, optimizer, cluster, 0, 2, micro_batches=2, scaler=scaler)
            before = everything(model, optimizer)
            for _ in range(2):
                optimizer.zero_grad()
                factor = float("inf") if cluster.rank == 1 else 1.0
                scaler.scale(sum(p.sum() for p in model.parameters()) * factor).backward()
                optimizer.step()
            assert everything(model, optimizer) == before
            assert optimizer.skipped_updates == 1
            assert scaler.get_scale() == 2.0**9
            step_together(model, optimizer, cluster, 2, 4, micro_batches=2, scaler=scaler)
            step_alone(oracle, reference, 2 * cluster.size, 0, 4, clip=clip)
            assert_close(model, oracle)
            assert same_everywhere(everything(model, optimizer)), (way, clip)


@on_ranks(3, "mpi")
def test_what_one_rank_uses_is_averaged_and_what_none_uses_is_left_alone(cluster):
    for way in both_ways():
        for options in ({}, {"max_grad_norm": 0.5}, {"compression": "fp16"}):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded(model, **options), stock(oracle)
            untouched = model[4].detach().clone()
            for step in range(3):
                # Rank 0 has gradients of the first two alone, the others of all but the fifth, rank 2 none.
                absent = {0: (2, 3, 4, 5, 6), 1: (4,), 2: range(7)}[cluster.rank]
                step_together(model, optimizer, cluster, step, step + 1, absent=absent)
                first, second = gradients(model, step, 0), gradients(model, step, 1)
                for i, q in enumerate(oracle.parameters()):
                    total = first[i] + second[i] if i < 2 else second[i]
                    q.grad = None if i == 4 else total / 3
                torch.nn.utils.clip_grad_norm_(oracle.parameters(), options.get("max_grad_norm", math.inf))
                reference.step()
            if "compression" not in options:
                assert_close(model, oracle)
            assert torch.equal(model[4], untouched)
            assert optimizer.state[model[4]]["step"].item() == 0
            assert same_everywhere(everything(model, optimizer)), (way, options)
            before = everything(model, optimizer)
            optimizer.zero_grad()
            optimizer.step()  # nobody has used anything
            assert everything(model, optimizer) == before


@on_ranks(2, "mpi")
def test_adasum_is_refused_with_what_to_use_instead(cluster):
    with pytest.raises(UserError, match=r"adasum .*: use strategy=allreduce, or op=average"):
        sharded(small_model(), op="adasum")


# Its state is everyone's.


@on_ranks(3, "mpi")
def test_pytorchs_adam_goes_on_from_the_state_dict_with_the_same_step(cluster):
    for way in both_ways():
        for options in ({}, {"amsgrad": True}):
            model, other = parameter_list(), parameter_list()
            optimizer = sharded(model, adam={**OPTIONS, **options})
            step_together(model, optimizer, cluster, 0, 3)
            other.load_state_dict(model.state_dict())
            plain = torch.optim.Adam(other.parameters())
            plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step_together(model, optimizer, cluster, 3, 5)
            step_alone(other, plain, cluster.size, 3, 5)
            assert_close(model, other)
            assert same_everywhere(digest(plain.state_dict())), (way, options)


@on_ranks(3)
def test_a_state_dict_stays_as_it_was_when_training_goes_on(cluster):
    model = parameter_list()
    optimizer = sharded(model)
    step_together(model, optimizer, cluster, 0, 3)
    saved = optimizer.state_dict()
    before = digest(saved)
    step_together(model, optimizer, cluster, 3, 5)
    assert digest(saved) == before


@on_ranks(3, "mpi")
def test_a_run_goes_from_allreduce_to_sharded_and_back_like_an_uninterrupted_one(cluster):
    for way in both_ways():
        for adam in (OPTIONS, {**OPTIONS, "amsgrad": True, "implementation": "reference"}):
            oracle = parameter_list()
            reference = stock(oracle, **{k: v for k, v in adam.items() if k != "implementation"})
            step_alone(oracle, reference, cluster.size, 0, 9)
            weights = state = None
            for part, strategy in enumerate(("allreduce", "sharded", "allreduce")):
                model = parameter_list()
                optimizer = distribute(Adam(model.parameters(), **adam), model, strategy=strategy)
                if weights is not None:
                    model.load_state_dict(weights)
                    optimizer.load_state_dict(state)
                    optimizer.broadcast()
                step_together(model, optimizer, cluster, 3 * part, 3 * part + 3)
                weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            assert_close(model, oracle)
            assert_same_state(state["state"], reference.state_dict()["state"])
            assert same_everywhere(everything(model, optimizer)), way


ANOTHER_NUMBER_OF_RANKS = """
import sys
import torch
from helpers.small_training import small_model, batches, share, train
from hvd_adam import Adam, distribute, init

action, path = sys.argv[1:]
cluster = init()
model = small_model()
optimizer = distribute(Adam(model.parameters(), lr=1e-2, amsgrad=True), model, strategy="sharded")
if action == "go on":
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for batch in list(batches(10, 24))[slice(5) if action == "begin" else slice(5, 10)]:
    ((inputs, targets),) = share(batch, cluster)
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
if cluster.rank == 0:
    torch.save(state, path)
"""


def test_what_two_ranks_have_saved_three_ranks_load_and_go_on_like_one(tmp_path):
    (tmp_path / "run.py").write_text(ANOTHER_NUMBER_OF_RANKS)
    env = {"PYTHONPATH": str(Path(__file__).parent)}
    for action, ranks in (("begin", 2), ("go on", 3)):
        done = launch([str(tmp_path / "run.py"), action, str(tmp_path / "state.pt")], ranks, "gloo", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    oracle = small_model()
    reference = torch.optim.Adam(oracle.parameters(), lr=1e-2, amsgrad=True, foreach=False)
    for inputs, targets in batches(10, 24):
        reference.zero_grad()
        F.mse_loss(oracle(inputs), targets).backward()
        reference.step()
    for name, weight in oracle.state_dict().items():
        torch.testing.assert_close(saved["model"][name], weight, rtol=1e-12, atol=1e-12)
    assert_same_state(saved["optimizer"]["state"], reference.state_dict()["state"])


def trained_elsewhere(steps, parts, **options):
    """A model and PyTorch's Adam that have made so many steps: what a checkpoint would hold."""
    model = parameter_list()
    optimizer = stock(model, **OPTIONS, **options)
    step_alone(model, optimizer, parts, 0, steps)
    return model, optimizer


@on_ranks(3, "mpi")
def test_loading_on_rank_0_alone_and_broadcasting_gives_it_to_all(cluster):
    for way in both_ways():
        for steps_before in (0, 2):
            source, reference = trained_elsewhere(3, cluster.size)
            model = parameter_list()
            optimizer = sharded(model)
            step_together(model, optimizer, cluster, 20, 20 + steps_before)
            if cluster.rank == 0:
                optimizer.load_state_dict(reference.state_dict())
                model.load_state_dict(source.state_dict())
            optimizer.broadcast()
            assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            step_together(model, optimizer, cluster, 3, 6)
            step_alone(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (way, steps_before)


@on_ranks(3, "mpi")
def test_loading_on_another_rank_alone_and_broadcasting_gives_back_rank_0s(cluster):
    for way in both_ways():
        source, reference = trained_elsewhere(3, cluster.size, amsgrad=True)
        model, oracle = parameter_list(), parameter_list()
        optimizer, other = sharded(model), stock(oracle)
        step_together(model, optimizer, cluster, 0, 2)
        step_alone(oracle, other, cluster.size, 0, 2)
        before = everything(model, optimizer)
        if cluster.rank == 1:
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
        optimizer.broadcast()
        assert everything(model, optimizer) == before
        step_together(model, optimizer, cluster, 2, 5)
        step_alone(oracle, other, cluster.size, 2, 5)
        assert_close(model, oracle)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3, "mpi")
def test_loading_on_all_ranks_needs_no_broadcast_and_bears_one(cluster):
    for way in both_ways():
        for then in ("step", "broadcast", "state_dict", "broadcast twice"):
            source, reference = trained_elsewhere(3, cluster.size)
            model = parameter_list()
            optimizer = sharded(model)
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
            if then == "state_dict":
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            for _ in range({"broadcast": 1, "broadcast twice": 2}.get(then, 0)):
                optimizer.broadcast()
            step_together(model, optimizer, cluster, 3, 6)
            step_alone(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (way, then)


@on_ranks(3)
def test_loaded_state_of_another_kind_is_taken_over_whatever_comes_next(cluster):
    for loaded_on in ("rank 0", "all ranks"):
        for then in ("broadcast", "state_dict", "step")[: 1 if loaded_on == "rank 0" else 3]:
            source, reference = trained_elsewhere(3, cluster.size, amsgrad=True)
            model = parameter_list()
            optimizer = sharded(model)  # without amsgrad: the loaded groups bring it
            if loaded_on == "all ranks" or cluster.rank == 0:
                optimizer.load_state_dict(reference.state_dict())
                model.load_state_dict(source.state_dict())
            if then == "broadcast":
                optimizer.broadcast()
            if then != "step":
                assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"], 0)
            step_together(model, optimizer, cluster, 3, 6)
            step_alone(source, reference, cluster.size, 3, 6)
            assert_close(model, source)
            assert same_everywhere(everything(model, optimizer)), (loaded_on, then)


@on_ranks(3)
def test_a_step_that_changes_nothing_after_loading_leaves_the_parts_what_they_are(cluster):
    def skip(model, optimizer, scaler):
        factor = float("inf") if cluster.rank == 1 else 1.0
        scaler.scale(sum(p.sum() for p in model.parameters()) * factor).backward()
        optimizer.step()

    def use_nothing(model, optimizer, scaler):
        optimizer.step()

    def synchronize(model, optimizer, scaler):
        optimizer.synchronize()

    for idle in (skip, use_nothing, synchronize):
        for then in ("broadcast", "add a group", "state_dict"):
            source, reference = trained_elsewhere(3, cluster.size)
            model = parameter_list()
            scaler = torch.amp.GradScaler("cpu")
            optimizer = sharded(model, loss_scaler=scaler)
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
            idle(model, optimizer, scaler)
            if then == "broadcast":
                optimizer.broadcast()
            elif then == "add a group":
                optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3).double())]})
            whole = {i: state for i, state in optimizer.state_dict()["state"].items() if i < len(ODD_SHAPES)}
            assert_same_state(whole, reference.state_dict()["state"], 0)
            optimizer.zero_grad()
            step_together(model, optimizer, cluster, 3, 5, scaler=scaler)
            step_alone(source, reference, cluster.size, 3, 5)
            assert_close(model, source)
            assert same_everywhere(digest(model.state_dict())), (idle, then)


@on_ranks(3, "mpi")
def test_an_added_group_leaves_the_moments_of_the_others(cluster):
    for way in both_ways():
        for loads in (False, True):
            model, oracle = parameter_list(), parameter_list()
            optimizer, reference = sharded(model), stock(oracle)
            step_together(model, optimizer, cluster, 0, 3)
            step_alone(oracle, reference, cluster.size, 0, 3)
            if loads:  # the loaded state is whole still when the group comes
                optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))
            extra, other = (torch.nn.Parameter(torch.ones(5, 5).double()) for _ in range(2))
            with torch.no_grad():
                extra += cluster.rank  # rank 0's is the one that counts
            optimizer.add_param_group({"params": [extra], "lr": 0.1 * (1 + cluster.rank)})
            reference.add_param_group({"params": [other], "lr": 0.1})
            model.append(extra)
            oracle.append(other)
            step_together(model, optimizer, cluster, 3, 6)
            step_alone(oracle, reference, cluster.size, 3, 6)
            assert_close(model, oracle)
            assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
            assert same_everywhere(everything(model, optimizer)), (way, loads)


@on_ranks(3)
def test_an_option_switched_on_midway_keeps_the_moments(cluster):
    for way in both_ways():
        model = parameter_list()
        optimizer = sharded(model)
        source, reference = trained_elsewhere(3, cluster.size)
        step_together(model, optimizer, cluster, 0, 3)
        for its in (optimizer, reference):
            its.param_groups[0]["amsgrad"] = True
        for state in reference.state.values():
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        step_together(model, optimizer, cluster, 3, 6)
        step_alone(source, reference, cluster.size, 3, 6)
        assert_close(model, source)
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(3)
def test_a_model_moved_to_float64_midway_trains_on(cluster):
    for way in both_ways():
        for then in ("step", "state_dict", "broadcast", "load", "load and broadcast"):
            model = parameter_list(dtype=torch.float32)
            optimizer = sharded(model)
            step_together(model, optimizer, cluster, 0, 3)
            oracle = parameter_list(dtype=torch.float32)
            reference = stock(oracle)
            model.double()
            oracle.load_state_dict(model.state_dict())
            oracle.double()
            state = copy.deepcopy(optimizer.state_dict())
            reference.load_state_dict(state)
            if "load" in then:
                for its in state["state"].values():
                    its["exp_avg"].add_(0.25)
                reference.load_state_dict(state)
                optimizer.load_state_dict(state)
            if "broadcast" in then:
                optimizer.broadcast()
            if then == "state_dict":
                optimizer.state_dict()
            step_together(model, optimizer, cluster, 3, 6)
            step_alone(oracle, reference, cluster.size, 3, 6)
            assert_close(model, oracle)
            assert {t.dtype for t in optimizer.state_dict()["state"][0].values()} == {torch.float32, torch.float64}
            assert same_everywhere(everything(model, optimizer)), (way, then)


@on_ranks(3)
def test_buckets_that_an_option_joins_midway_lose_no_gradient(cluster):
    for strategy in ("allreduce", "sharded"):
        model = parameter_list(((5,), (7,)), torch.bfloat16)
        groups = [{"params": [model[0]], "master_weights": True}, {"params": [model[1]]}]
        optimizer = distribute(Adam(groups), model, strategy=strategy)
        step_together(model, optimizer, cluster, 0, 1)
        optimizer.param_groups[1]["master_weights"] = True  # its moments are float32 now, as the other group's
        optimizer.zero_grad()
        mine = gradients(model, 1, cluster.rank)
        for i in (1, 0):
            (model[i] * mine[i].bfloat16()).sum().backward()
            hvd.allgather_object(i)  # what has been sent by now has arrived
        optimizer.synchronize()
        for i, p in enumerate(model):
            mean = sum(gradients(model, 1, rank)[i] for rank in range(cluster.size)) / cluster.size
            assert p.grad is not None, (strategy, i)
            torch.testing.assert_close(
                p.grad.double(), mean, rtol=2**-7, atol=0
            )  # the sum is rounded, then the mean
        optimizer.step()


@on_ranks(4, "mpi")
def test_four_ranks_save_load_and_go_on_like_one(cluster):
    for way in both_ways():
        source, reference = trained_elsewhere(3, cluster.size, amsgrad=True)
        model = parameter_list()
        optimizer = sharded(model, adam={**OPTIONS, "amsgrad": True}, max_grad_norm=0.5, accumulate=2)
        if cluster.rank == 0:
            optimizer.load_state_dict(reference.state_dict())
            model.load_state_dict(source.state_dict())
        optimizer.broadcast()
        step_together(model, optimizer, cluster, 3, 6, micro_batches=2)
        step_alone(source, reference, 2 * cluster.size, 3, 6, clip=0.5)
        assert_close(model, source)
        assert_same_state(optimizer.state_dict()["state"], reference.state_dict()["state"])
        assert same_everywhere(everything(model, optimizer)), way


@on_ranks(4, "mpi")
def test_sums_over_scattered_parts_do_not_depend_on_the_order_of_gradients(cluster):
    def sums(repeat):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(6)))
        optimizer = sharded(model)
        torch.manual_seed(cluster.rank)
        mine = [torch.randn_like(p) * 10 ** torch.randn_like(p) for p in model.parameters()]
        order = torch.randperm(6, generator=torch.Generator().manual_seed(repeat + cluster.rank)).tolist()
        for layer in order:
            pairs = zip(model[layer].parameters(), mine[2 * layer : 2 * layer + 2], strict=True)
            sum((p * g).sum() for p, g in pairs).backward()
        optimizer.synchronize()
        return digest([p.grad for p in model.parameters()])

    with scattering():
        assert len({sums(repeat) for repeat in range(3)}) == 1


@on_ranks(2, "mpi")
def test_scattering_under_mpi_makes_the_update_of_one(cluster):
    with scattering():
        model, oracle = small_model(), small_model()
        optimizer = sharded(model, adam={"lr": 1e-2}, accumulate=2, max_grad_norm=0.1)
        train(model, optimizer, cluster, micro_batches=2)
        train_alone(oracle, lr=1e-2, clip=0.1)
        assert largest_difference(model, oracle) < 1e-12


# End to end.


def test_a_sharded_run_leaves_a_checkpoint_for_everyone(tmp_path):
    folder = tmp_path / "run"
    run = ["--epochs", "1", "--log-every", "5", "--max-grad-norm", "1", "--output-dir", str(folder)]
    done = launch(["-m", "hvd_adam.train", "--strategy", "sharded", *run], 2, "gloo")
    assert done.returncode == 0, done.stdout + done.stderr
    end = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["test_accuracy"] > 0.5

    done = launch(["-m", "hvd_adam.evaluate", "--checkpoint", str(folder), "--json"], 0, "gloo")
    assert json.loads(done.stdout)["test_accuracy"] == end["test_accuracy"], done.stderr

    latest = (folder / "checkpoints" / "latest").read_text().strip()
    state = torch.load(folder / "checkpoints" / latest / "state.pt", weights_only=True)
    weights = torch.nn.ParameterList(list(state["model"].values()))
    optimizer = torch.optim.Adam(weights.parameters())
    optimizer.load_state_dict(state["optimizer"])
    for p in weights.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["step"].item() == state["progress"]["step"] == 22
        assert torch.all(optimizer.state[p]["exp_avg_sq"] >= 0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
