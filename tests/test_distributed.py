"""distribute: N ranks train as one, and none of the traps of Horovod's wrapper is open.

Hazards: state and hyper-parameters lost in wrapping; a broadcast that fakes a step; sums taken for means
(accumulation); clipping and unscaling before the average; half-precision sums that overflow, bfloat16 that
Horovod does not know, channels-last gradients that it refuses; parameters used on some ranks or on none;
closures and late parameters that diverge silently; hooks that fire twice; sums that depend on timing.

Where stock Horovod goes wrong, the test shows that too, so that it stands for something. Every promise is tested
with every strategy; what is the sharded one's own is in `test_sharded.py`.
"""

import copy
import functools
import pickle
import sys
import time
import warnings

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from helpers.on_ranks import on_ranks
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
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.errors import UserError


def with_each_strategy(body):
    """Runs the body of a test, which takes a cluster and a strategy, once with each strategy."""

    @functools.wraps(body)
    def run(cluster):
        for strategy in STRATEGIES:
            torch.manual_seed(0)
            try:
                body(cluster, strategy)
            except BaseException as error:
                raise AssertionError(f"failed with strategy {strategy!r}") from error

    return run


# N ranks are one.


def assert_the_update_of_one_rank(cluster, strategy, implementation, clip=None, micro_batches=1):
    """All ranks together make the run of one process with whole batches, whatever computes the update."""
    model, oracle = small_model(), small_model()
    adam = {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # "no fused update here": then nothing would be shown
        optimizer = distribute(
            Adam(model.parameters(), **adam, implementation=implementation),
            model,
            strategy=strategy,
            max_grad_norm=clip,
            accumulate=micro_batches,
        )
        train(model, optimizer, cluster, micro_batches=micro_batches)
    train_alone(oracle, clip=clip, **adam)
    # Sums in another order: some ulps of float64 per step, times lr / √v.
    difference = largest_difference(model, oracle)
    assert difference < 1e-12, (implementation, clip, micro_batches, difference)
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@with_each_strategy
def test_two_ranks_make_the_update_of_one_with_the_whole_batch(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        for options in ({}, {"micro_batches": 2}, {"clip": 0.1}, {"clip": 0.1, "micro_batches": 4}):
            assert_the_update_of_one_rank(cluster, strategy, implementation, **options)


@on_ranks(4)
@with_each_strategy
def test_four_ranks_make_the_update_of_one_with_the_whole_batch(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        assert_the_update_of_one_rank(cluster, strategy, implementation, clip=0.1, micro_batches=2)


@on_ranks(2, "mpi")
@with_each_strategy
def test_mpi_and_gloo_make_the_same_update(cluster, strategy):
    for implementation in ("reference", "foreach", "fused"):
        assert_the_update_of_one_rank(cluster, strategy, implementation, clip=0.1, micro_batches=2)


@on_ranks(2)
@with_each_strategy
def test_accumulation_yields_the_mean_where_the_stock_wrapper_yields_the_sum(cluster, strategy):
    def averaged_gradient(stock):
        model = small_model()
        adam = Adam(model.parameters())
        if stock:
            optimizer = hvd.DistributedOptimizer(adam, model.named_parameters(), backward_passes_per_step=2)
        else:
            optimizer = distribute(adam, model, accumulate=2, strategy=strategy)
        (batch,) = batches(1, 16)
        for inputs, targets in share(batch, cluster, 2):
            F.mse_loss(model(inputs), targets).backward()
        optimizer.synchronize()
        return model[0].weight.grad

    model = small_model()
    (batch,) = batches(1, 16)
    F.mse_loss(model(batch[0]), batch[1]).backward()
    expected = model[0].weight.grad
    torch.testing.assert_close(averaged_gradient(stock=True), 2 * expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(averaged_gradient(stock=False), expected, rtol=1e-12, atol=1e-14)


@on_ranks(2)
@with_each_strategy
def test_zero_grad_between_micro_batches_keeps_what_has_been_accumulated(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, accumulate=2, strategy=strategy)
    (batch,) = batches(1, 16)
    first, second = share(batch, cluster, 2)
    F.mse_loss(model(first[0]), first[1]).backward()
    optimizer.step()
    before = model[0].weight.grad.clone()
    optimizer.zero_grad()
    assert torch.equal(model[0].weight.grad, before)
    F.mse_loss(model(second[0]), second[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert model[0].weight.grad is None


# One truth.


@on_ranks(2)
@with_each_strategy
def test_after_distribute_every_rank_has_what_rank_0_had(cluster, strategy):
    for trained_on in ("nobody", "rank 0", "every rank"):
        model = torch.nn.Sequential(small_model(seed=cluster.rank), torch.nn.BatchNorm1d(3).double())
        model[1].running_mean += cluster.rank
        optimizer = Adam(model.parameters(), lr=0.1 * (1 + cluster.rank), weight_decay=0.1, amsgrad=True)
        if trained_on == "every rank" or (trained_on == "rank 0" and cluster.rank == 0):
            for _ in range(2 + cluster.rank):
                optimizer.zero_grad()
                model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
                optimizer.step()
        before = everything(model, optimizer)
        optimizer = distribute(optimizer, model, strategy=strategy)
        after = everything(model, optimizer)
        assert same_everywhere(after), trained_on
        assert cluster.rank != 0 or before == after, trained_on


@on_ranks(2)
@with_each_strategy
def test_the_stock_broadcast_fakes_a_step_and_ours_does_not(cluster, strategy):
    def steps_and_weights(stock):
        model = small_model()
        # Stock Horovod meets the optimizer it was written for: one whose state comes with the first step.
        if stock:
            optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
            hvd.broadcast_parameters(model.state_dict(), root_rank=0)
            hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        else:
            optimizer = distribute(Adam(model.parameters(), weight_decay=0.1), model, strategy=strategy)
        return optimizer.state[model[0].weight]["step"].item(), digest(model.state_dict())

    untouched = digest(small_model().state_dict())
    assert steps_and_weights(stock=False) == (0.0, untouched)
    steps, weights = steps_and_weights(stock=True)
    assert steps == 1.0
    assert weights != untouched


@on_ranks(2)
@with_each_strategy
def test_state_on_rank_0_alone_reaches_all_ranks_and_training_goes_on_in_step(cluster, strategy):
    model = small_model(seed=cluster.rank)
    optimizer = Adam(model.parameters(), weight_decay=0.1)
    if cluster.rank == 0:
        train_alone(model)
        for state in optimizer.state.values():
            state["step"] += 5
            state["exp_avg"].normal_()
            state["exp_avg_sq"].uniform_()
    optimizer = distribute(optimizer, model, strategy=strategy)
    train(model, optimizer, cluster)
    assert optimizer.state[model[0].weight]["step"].item() == 10
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@with_each_strategy
def test_state_of_frozen_parameters_on_one_rank_alone_is_settled_by_rank_0(cluster, strategy):
    model = small_model()
    model[0].weight.requires_grad_(cluster.rank == 0)  # so that only rank 0 has state for it
    optimizer = Adam(model.parameters())
    model[0].weight.requires_grad_(True)
    optimizer = distribute(optimizer, model, strategy=strategy)
    assert same_everywhere(everything(model, optimizer))
    train(model, optimizer, cluster)
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@with_each_strategy
def test_bfloat16_half_bool_and_channels_last_tensors_are_broadcast_bit_for_bit(cluster, strategy):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(cluster.rank)
            self.small = torch.nn.Parameter(torch.randn(5, generator=generator).half())
            self.brain = torch.nn.Parameter(torch.randn(5, generator=generator).bfloat16())
            convolution = torch.randn(4, 3, 2, 2, generator=generator)
            self.convolution = torch.nn.Parameter(convolution.to(memory_format=torch.channels_last))
            self.scalar = torch.nn.Parameter(torch.randn((), generator=generator))
            self.register_buffer("flag", torch.tensor(cluster.rank == 0))
            self.register_buffer("not_a_number", torch.tensor([0x7FC00000 + cluster.rank], dtype=torch.int32))
            self.register_buffer("wave", torch.randn(3, generator=generator, dtype=torch.complex64))
            self.register_buffer("empty", torch.empty(0))

    model = Odd()
    model.not_a_number = model.not_a_number.view(torch.float32)
    before = digest(model.state_dict())
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    assert same_everywhere(everything(model, optimizer))
    assert cluster.rank != 0 or digest(model.state_dict()) == before
    assert model.convolution.is_contiguous(memory_format=torch.channels_last)


@on_ranks(2)
@with_each_strategy
def test_hyper_parameters_that_differ_become_rank_0s_also_as_tensors(cluster, strategy):
    model = small_model()
    lr = torch.tensor(0.1 * (1 + cluster.rank))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "betas": (0.5, 0.6)}]
    optimizer = distribute(Adam(groups, lr=lr, eps=1e-8 * (1 + cluster.rank)), model, strategy=strategy)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == torch.tensor(0.1).item()
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.6)]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8}
    for root_is_tensor in (True, False):
        is_tensor = root_is_tensor == (cluster.rank == 0)
        lr = torch.tensor(0.1) if is_tensor else 0.1
        optimizer = distribute(Adam(model.parameters(), lr=lr), model, strategy=strategy)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == root_is_tensor
        assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@with_each_strategy
def test_every_hyper_parameter_and_the_state_survive_the_wrapping(cluster, strategy):
    model = small_model()
    adam = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}
    options = {"decoupled_weight_decay": True, "maximize": True, "implementation": "reference"}
    original = Adam(model.parameters(), **adam, **options)
    original.state[model[0].weight]["exp_avg"].fill_(0.25)
    optimizer = distribute(original, model, strategy=strategy)
    assert {key: optimizer.param_groups[0][key] for key in adam | options} == adam | options
    assert torch.all(whole_state(optimizer, model[0].weight)["exp_avg"] == 0.25)
    # Stock: the object is made anew, and its state with it.
    original = Adam(model.parameters(), **adam)
    original.state[model[0].weight]["exp_avg"].fill_(0.25)
    stock = hvd.DistributedOptimizer(original, model.named_parameters())
    assert torch.all(stock.state[model[0].weight]["exp_avg"] == 0)


@on_ranks(2)
@with_each_strategy
def test_a_model_that_differs_on_one_rank_is_refused_on_all(cluster, strategy):
    model = torch.nn.Linear(3, 2 + cluster.rank)
    before = digest(model.state_dict())
    with pytest.raises(
        UserError, match=r"rank 1 on .*: the model differs from rank 0's: weight is .*3, 3.* here and .*2, 3"
    ):
        distribute(Adam(model.parameters()), model, strategy=strategy)
    assert digest(model.state_dict()) == before


@on_ranks(2)
@with_each_strategy
def test_a_model_built_or_frozen_otherwise_on_one_rank_is_refused_on_all(cluster, strategy):
    def extra_layer_on(rank):
        model = small_model()
        if cluster.rank == rank:
            model.append(torch.nn.Linear(3, 3).double())
        return model

    def frozen_on(rank):
        model = small_model()
        model[0].weight.requires_grad_(cluster.rank != rank)
        return model

    for build, difference in (
        (extra_layer_on, r"3\.weight is .*absent"),
        (frozen_on, r"0\.weight is .* to train"),
    ):
        for rank in range(2):
            model = build(rank)
            with pytest.raises(UserError, match=rf"rank 1 on \S+: the model differs from rank 0's: {difference}"):
                distribute(Adam(model.parameters()), model, strategy=strategy)
    model = small_model()
    groups = [{"params": list(model[layer].parameters())} for layer in (0, 2)]
    with pytest.raises(UserError, match="parameter groups differ"):
        distribute(Adam(groups if cluster.rank else groups[::-1]), model, strategy=strategy)


@on_ranks(2)
@with_each_strategy
def test_options_that_differ_on_one_rank_are_refused_on_all(cluster, strategy):
    model = small_model()
    for options, message in (
        (
            {"strategy": list(STRATEGIES)[cluster.rank]},
            "strategy is 'allreduce' on rank 0 and 'sharded' on rank 1",
        ),
        ({"max_grad_norm": 1.0 + cluster.rank}, "max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1"),
        ({"accumulate": 1 + cluster.rank}, "accumulate is 1 on rank 0 and 2 on rank 1"),
        ({"compression": ("none", "bf16")[cluster.rank]}, "compression is 'none' on rank 0 and 'bf16' on rank 1"),
    ):
        with pytest.raises(UserError, match=message):
            distribute(Adam(model.parameters()), model, **{"strategy": strategy, **options})


# What the wire can carry.


@on_ranks(2)
@with_each_strategy
def test_bfloat16_gradients_are_averaged_which_stock_horovod_refuses(cluster, strategy):
    model = torch.nn.Linear(3, 1, bias=False).bfloat16()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    model.weight.grad = None
    (model.weight * (1.0 + cluster.rank)).sum().backward()
    optimizer.synchronize()
    assert model.weight.grad.tolist() == [[1.5, 1.5, 1.5]]
    assert model.weight.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not supported"):
        hvd.allreduce(model.weight.grad)


@on_ranks(2)
@with_each_strategy
def test_a_float16_sum_that_overflows_in_stock_horovod_averages_here(cluster, strategy):
    def mean(stock):
        model = torch.nn.Linear(3, 1, bias=False)
        adam = Adam(model.parameters())
        if stock:
            compression = hvd.Compression.fp16
            optimizer = hvd.DistributedOptimizer(adam, model.named_parameters(), compression)
        else:
            optimizer = distribute(adam, model, compression="fp16", strategy=strategy)
        (model.weight * 4e4).sum().backward()
        optimizer.synchronize()
        return model.weight.grad[0, 0].item()

    assert mean(stock=True) == float("inf")
    assert mean(stock=False) == 4e4


@on_ranks(2)
@with_each_strategy
def test_a_float16_sum_over_micro_batches_does_not_overflow_either(cluster, strategy):
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = distribute(Adam(model.parameters()), model, compression="fp16", accumulate=8, strategy=strategy)
    for _ in range(8):
        (model.weight * 2e4).sum().backward()
        if optimizer._micro_batches < 7:
            optimizer.step()
    optimizer.synchronize()
    assert model.weight.grad[0].tolist() == [2e4] * 3


@on_ranks(2)
@with_each_strategy
def test_compression_costs_its_rounding_and_nothing_else(cluster, strategy):
    for compression, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):  # unit roundoff: 11 and 8 significant bits
        for dtype in (torch.float32, torch.float64):
            model = torch.nn.Linear(1, 1001, bias=False).to(dtype)  # does not divide by the ranks
            optimizer = distribute(
                Adam(model.parameters()), model, compression=compression, accumulate=2, strategy=strategy
            )
            generator = torch.Generator().manual_seed(1)
            gradients = torch.randn(2, 2, 1001, generator=generator, dtype=torch.float64)
            for micro_batch in range(2):
                (model.weight[:, 0] * gradients[cluster.rank, micro_batch].to(dtype)).sum().backward()
                optimizer.step() if micro_batch == 0 else optimizer.synchronize()
            expected = gradients.mean(dim=(0, 1))
            # Each rank's sum over micro-batches is rounded once, and the result once more.
            bound = unit * (gradients.sum(dim=1).abs().sum(dim=0) / 4 + expected.abs()) * 1.01 + 1e-7
            error = (model.weight.grad[:, 0].double() - expected).abs()
            assert torch.all(error <= bound), (compression, dtype, (error / bound).max())
            assert model.weight.grad.dtype == dtype
            assert same_everywhere(digest(model.weight.grad))


@on_ranks(2)
@with_each_strategy
def test_gradients_beyond_float16s_range_travel_as_bf16(cluster, strategy):
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = distribute(Adam(model.parameters()), model, compression="bf16", strategy=strategy)
    (model.weight * 2.0**100).sum().backward()
    optimizer.synchronize()
    assert model.weight.grad[0].tolist() == [2.0**100] * 3


@on_ranks(2)
@with_each_strategy
def test_channels_last_weights_train_and_stay_channels_last(cluster, strategy):
    for compression in ("none", "fp16", "bf16"):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        oracle = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        optimizer = distribute(Adam(model.parameters()), model, compression=compression, strategy=strategy)
        inputs = torch.randn(4, 3, 8, 8)
        model(inputs.chunk(2)[cluster.rank].to(memory_format=torch.channels_last)).square().mean().backward()
        oracle(inputs).square().mean().backward()
        assert not model.weight.grad.is_contiguous()
        optimizer.synchronize()
        assert model.weight.grad.stride() == model.weight.stride(), compression
        tolerance = {"none": 1e-6, "fp16": 2.0**-10, "bf16": 2.0**-7}[compression]
        torch.testing.assert_close(model.weight.grad, oracle.weight.grad, rtol=tolerance, atol=tolerance)
        optimizer.step()


# Clipping and loss scaling.


@on_ranks(2)
@with_each_strategy
def test_clipping_uses_the_norm_of_the_averaged_gradient(cluster, strategy):
    model = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = distribute(Adam(model.parameters()), model, max_grad_norm=1.0, strategy=strategy)
    (model.weight * (8.0 if cluster.rank else -4.0)).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm.item() == 2.0
    first_moment = whole_state(optimizer, model.weight)["exp_avg"].item()  # 0.1 of the clipped gradient
    assert abs(first_moment - 0.1) < 1e-6  # clip_grad_norm_ divides by norm + 1e-6


@on_ranks(2)
@with_each_strategy
def test_loss_scaling_changes_nothing_but_the_range_and_skips_on_all_ranks_together(cluster, strategy):
    model, oracle = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10 * (1 + cluster.rank))
    optimizer = distribute(
        Adam(model.parameters(), lr=1e-2),
        model,
        max_grad_norm=0.1,
        accumulate=2,
        loss_scaler=scaler,
        strategy=strategy,
    )
    assert scaler.get_scale() == 2.0**10  # rank 0's
    train(model, optimizer, cluster, micro_batches=2, scaler=scaler)
    train_alone(oracle, lr=1e-2, clip=0.1)
    assert largest_difference(model, oracle) < 1e-12

    before, steps = digest(model.state_dict()), optimizer.state[model[0].weight]["step"].item()
    for _ in range(2):
        optimizer.zero_grad()
        factor = float("inf") if cluster.rank == 1 else 1.0  # overflow on one rank alone
        scaler.scale(model(torch.ones(1, 6, dtype=torch.float64)).sum() * factor).backward()
        optimizer.step()
    assert digest(model.state_dict()) == before
    assert optimizer.state[model[0].weight]["step"].item() == steps
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_updates == 1

    optimizer.zero_grad()
    for _ in range(2):  # nothing to unscale: as without a scaler, nothing happens
        optimizer.step()
    assert digest(model.state_dict()) == before
    train(model, optimizer, cluster, micro_batches=2, scaler=scaler)
    assert optimizer.skipped_updates == 1


@on_ranks(2)
@with_each_strategy
def test_a_gradscaler_that_steps_by_itself_is_refused(cluster, strategy):
    model = small_model()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    scaler.scale(model(torch.ones(1, 6, dtype=torch.float64)).sum()).backward()
    with pytest.raises(RuntimeError, match="give the GradScaler to distribute"):
        scaler.step(optimizer)
    optimizer.synchronize()


# Parameters that come, go, or are not used.


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.never = (torch.nn.Linear(6, 3).double() for _ in range(3))

    def forward(self, inputs, branch):
        return getattr(self, branch)(inputs)


@on_ranks(2)
@with_each_strategy
def test_a_parameter_used_on_one_rank_is_averaged_and_one_used_on_none_is_left_alone(cluster, strategy):
    for options in ({}, {"compression": "bf16"}, {"accumulate": 2}):
        model, oracle = Branches(), Branches()
        optimizer = distribute(Adam(model.parameters(), weight_decay=0.1), model, strategy=strategy, **options)
        reference = torch.optim.Adam(oracle.parameters(), weight_decay=0.1)
        tolerance = 1e-2 if options.get("compression") else 1e-12
        for inputs, _ in batches(3, 8):
            reference.zero_grad()
            for branch, part in zip(("left", "right"), inputs.chunk(2), strict=True):
                (oracle(part, branch).square().mean() / 2).backward()
            reference.step()
            for _ in range(options.get("accumulate", 1)):
                optimizer.zero_grad()
                branch = ("left", "right")[cluster.rank]
                model(inputs.chunk(2)[cluster.rank], branch).square().mean().backward()
                optimizer.step()
        assert largest_difference(model, oracle) < tolerance, options
        assert optimizer.state[model.never.weight]["step"].item() == 0
        assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
def test_stock_horovod_steps_what_no_rank_has_used(cluster):
    model = Branches()
    before = model.never.weight.detach().clone()
    stock = hvd.DistributedOptimizer(Adam(model.parameters(), weight_decay=0.1), model.named_parameters())
    model(torch.ones(2, 6, dtype=torch.float64), "left").sum().backward()
    stock.step()
    assert not torch.equal(model.never.weight, before)


@on_ranks(2)
@with_each_strategy
def test_a_rank_without_a_batch_still_takes_part(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    if cluster.rank == 0:
        model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@with_each_strategy
def test_a_parameter_unfrozen_afterwards_is_refused_and_not_left_to_diverge(cluster, strategy):
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    train(model, optimizer, cluster)
    model[0].weight.requires_grad_(True)
    optimizer.zero_grad()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient but was frozen"):
        optimizer.step()
    optimizer._reducer.finish()


@on_ranks(2)
@with_each_strategy
def test_an_added_group_becomes_rank_0s_and_is_averaged(cluster, strategy):
    for options in ({}, {"compression": "bf16"}):
        model, head = small_model(), torch.nn.Linear(3, 2).double()
        optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, **options)
        with torch.no_grad():
            head.weight.fill_(1.0 + cluster.rank)
            head.bias.zero_()
        optimizer.add_param_group({"params": head.parameters(), "lr": 0.1 * (1 + cluster.rank)})
        assert optimizer.param_groups[1]["lr"] == 0.1
        assert torch.all(head.weight == 1)
        head(model(torch.ones(2, 6, dtype=torch.float64) * (1 + cluster.rank))).sum().backward()
        optimizer.step()
        assert same_everywhere(digest(head.state_dict(), everything(model, optimizer)))
        assert optimizer.state[head.weight]["step"].item() == 1


@on_ranks(2)
@with_each_strategy
def test_tied_weights_train(cluster, strategy):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4).double()
            self.decoder.weight = self.encoder.weight

        def forward(self, inputs):
            return self.decoder(self.encoder(inputs))

    model, oracle = Tied(), Tied()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    reference = torch.optim.Adam(oracle.parameters())
    for inputs, _ in batches(3, 8):
        inputs = inputs[:, :4]
        oracle(inputs).square().mean().backward()
        reference.step()
        reference.zero_grad()
        model(inputs.chunk(2)[cluster.rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2)
@with_each_strategy
def test_two_distributed_optimizers_in_one_process_keep_apart(cluster, strategy):
    generator, critic = small_model(), small_model(seed=1)
    generators = distribute(Adam(generator.parameters()), generator, strategy=strategy)
    critics = distribute(Adam(critic.parameters()), critic, strategy=strategy)
    for model in (generator, critic):
        model(torch.ones(2, 6, dtype=torch.float64) * (1 + cluster.rank)).square().sum().backward()
    generators.step()
    critics.step()
    assert same_everywhere(everything(generator, generators) + everything(critic, critics))


# An optimizer to everyone who asks.


@on_ranks(2)
@with_each_strategy
def test_it_is_an_optimizer_for_schedulers_hooks_and_state_dicts(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), lr=1.0), model, strategy=strategy)
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, cluster, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
        scheduler.step()
    assert calls == ["pre", "post"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    plain = torch.optim.Adam(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    assert plain.state[model[0].weight]["step"].item() == 1


@on_ranks(2)
@with_each_strategy
def test_hooks_registered_before_distribute_still_fire(cluster, strategy):
    model, calls = small_model(), []
    adam = Adam(model.parameters())
    adam.register_step_post_hook(lambda *_: calls.append("post"))
    handle = adam.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer = distribute(adam, model, strategy=strategy)
    train(model, optimizer, cluster, steps=1)
    handle.remove()
    train(model, optimizer, cluster, steps=1)
    assert calls == ["pre", "post", "post"]


@on_ranks(2)
def test_stock_step_hooks_fire_twice(cluster):
    model = small_model()
    stock = hvd.DistributedOptimizer(Adam(model.parameters()), model.named_parameters())
    calls = []
    stock.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, stock, cluster, steps=1)
    assert calls == ["post", "post"]


@on_ranks(2)
@with_each_strategy
def test_loading_on_rank_0_and_broadcasting_resumes_all_ranks(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), lr=1e-2), model, strategy=strategy)
    train(model, optimizer, cluster)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, cluster)
    expected = everything(model, optimizer)

    other = small_model(seed=1 + cluster.rank)
    resumed = distribute(Adam(other.parameters()), other, strategy=strategy)
    if cluster.rank == 0:
        resumed.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
    resumed.broadcast()
    train(other, resumed, cluster)
    assert everything(other, resumed) == expected


@on_ranks(2)
@with_each_strategy
def test_zero_grad_takes_set_to_none_and_refuses_gradients_in_flight(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="in flight"):
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="load_state_dict"):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert torch.all(model[0].weight.grad == 0)
    optimizer.zero_grad(set_to_none=True)
    assert model[0].weight.grad is None


@on_ranks(2)
@with_each_strategy
def test_a_closure_on_several_ranks_is_refused_where_stock_ranks_diverge(cluster, strategy):
    def closure_step(optimizer, model):
        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 6, dtype=torch.float64) * (1 + cluster.rank)).sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    with pytest.raises(RuntimeError, match=r"step\(closure\) works on one rank"):
        closure_step(optimizer, model)

    model = Branches()  # stock: the closure's backward runs after the gradients were exchanged
    stock = hvd.DistributedOptimizer(Adam(model.parameters()), model.named_parameters())

    def closure():
        loss = model(torch.ones(2, 6, dtype=torch.float64), ("left", "right")[cluster.rank]).sum()
        loss.backward()
        return loss

    stock.step(closure)
    assert not same_everywhere(digest(model.state_dict()))
    stock.synchronize()


@on_ranks(2)
@with_each_strategy
def test_subclasses_work_below_and_above_the_wrapping(cluster, strategy):
    class Counting(Adam):
        steps = 0

        def step(self, closure=None):
            type(self).steps += 1
            Counting.steps += 1
            return super().step(closure)

    model = small_model()
    optimizer = distribute(Counting(model.parameters()), model, strategy=strategy)
    train(model, optimizer, cluster, steps=2)
    assert Counting.steps == 2

    class Above(type(optimizer)):
        def step(self, closure=None):
            return super().step(closure)

    optimizer.__class__ = Above
    train(model, optimizer, cluster, steps=1)
    assert Counting.steps == 3
    stock = hvd.DistributedOptimizer(Adam(model.parameters()), model.named_parameters())
    stock.__class__ = type("Above", (type(stock),), {})
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(300)  # each turn reduces all gradients
    try:
        with pytest.raises(RecursionError):
            stock.step()
    finally:
        sys.setrecursionlimit(limit)


@on_ranks(2)
@with_each_strategy
def test_copying_and_pickling_are_refused_with_the_reason(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


@on_ranks(2)
def test_impossible_options_are_refused_with_what_to_do(cluster):
    model = small_model()
    adam = Adam(model.parameters())
    for options, message in (
        ({"strategy": "ring"}, "strategy is 'ring'; use one of"),
        ({"compression": "int8"}, "compression is 'int8'; use one of none, fp16, bf16"),
        ({"op": "sum"}, "op is 'sum'; use one of average, adasum"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": "2"}, "accumulate is '2'; it must be a whole number"),
        ({"accumulate": float("nan")}, "accumulate is nan"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'; it must be a number"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be a number > 0"),
        ({"op": "adasum", "max_grad_norm": 1.0}, "adasum .* cannot clip"),
        ({"op": "adasum"}, "adasum needs MPI; start the ranks with mpirun"),
        ({"op": "adasum", "strategy": "sharded"}, "adasum .* use strategy=allreduce, or op=average"),
    ):
        with pytest.raises(UserError, match=message):
            distribute(adam, model, **options)
    with pytest.raises(TypeError, match=r"hvd_adam\.Adam, not SGD"):
        distribute(torch.optim.SGD(model.parameters(), lr=1.0), model)
    optimizer = distribute(adam, model)
    with pytest.raises(UserError, match="distributed already"):
        distribute(optimizer, model)


@on_ranks(2)
@with_each_strategy
def test_sparse_gradients_are_refused_with_the_remedy(cluster, strategy):
    model = torch.nn.Embedding(4, 2, sparse=True)
    distribute(Adam(model.parameters()), model, strategy=strategy)
    with pytest.raises(RuntimeError, match="sparse=False"):
        model(torch.tensor([1])).sum().backward()


# Repeatable sums.


@on_ranks(4)
@with_each_strategy
def test_sums_over_four_ranks_do_not_depend_on_timing(cluster, strategy):
    def sums(repeat):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(200, 200) for _ in range(12)))
        optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
        torch.manual_seed(cluster.rank)
        gradients = [torch.randn_like(p) * 10 ** torch.randn_like(p) for p in model.parameters()]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(repeat)).tolist()
        for layer in order:  # gradients come in another order and at other times in each repeat
            time.sleep(0.002 * ((repeat + layer + cluster.rank) % 3))
            pairs = zip(model[layer].parameters(), gradients[2 * layer : 2 * layer + 2], strict=True)
            sum((parameter * gradient).sum() for parameter, gradient in pairs).backward()
        optimizer.synchronize()
        return digest([p.grad for p in model.parameters()])

    assert len({sums(repeat) for repeat in range(4)}) == 1


# Adasum.


@on_ranks(2, "mpi")
def test_adasum_keeps_ranks_equal_and_learns(cluster):
    for options in ({}, {"compression": "fp16"}, {"accumulate": 2}):
        model = small_model(torch.float32)
        optimizer = distribute(Adam(model.parameters(), lr=1e-2), model, op="adasum", **options)
        (first, *_), loss = batches(1, 16, torch.float32), []
        for _ in range(60):
            for inputs, targets in share(first, cluster, options.get("accumulate", 1)):
                optimizer.zero_grad()
                error = F.mse_loss(model(inputs), targets)
                error.backward()
                optimizer.step()
            loss.append(error.item())
        assert loss[-1] < loss[0] / 2, options
        assert same_everywhere(digest(model.state_dict())), options


@on_ranks(2, "mpi")
def test_adasum_of_equal_steps_is_that_step_and_leaves_unused_parameters_alone(cluster):
    model, oracle = Branches(), Branches()
    optimizer = distribute(Adam(model.parameters(), weight_decay=0.1), model, op="adasum", accumulate=2)
    reference = torch.optim.Adam(oracle.parameters(), weight_decay=0.1)
    for inputs, _ in batches(3, 8):
        reference.zero_grad()
        oracle(inputs, "left").square().mean().backward()
        reference.step()
        for _ in range(2):
            optimizer.zero_grad()
            model(inputs, "left").square().mean().backward()
            optimizer.step()
    # Adasum of two equal vectors is their mean (arXiv 2006.02924, equation 4); its dot products are rounded.
    assert largest_difference(model, oracle) < 1e-12


@on_ranks(2, "mpi")
def test_adasum_has_no_averaged_gradient_to_wait_for(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    with pytest.raises(RuntimeError, match="adasum combines updates"):
        optimizer.synchronize()


@on_ranks(2, "mpi")
def test_adasum_refuses_a_parameter_unfrozen_afterwards(cluster):
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    model[0].weight.requires_grad_(True)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient but was frozen"):
        optimizer.step()
    model[0].weight.grad = None
    optimizer.step()


# One rank, no launcher.


@on_ranks(0)
@with_each_strategy
def test_one_rank_accumulates_clips_scales_and_takes_a_closure(cluster, strategy):
    model, oracle = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu")
    optimizer = distribute(
        Adam(model.parameters(), lr=1e-2),
        model,
        accumulate=4,
        max_grad_norm=0.1,
        loss_scaler=scaler,
        strategy=strategy,
    )
    train(model, optimizer, cluster, micro_batches=4, scaler=scaler)
    train_alone(oracle, lr=1e-2, clip=0.1)
    assert largest_difference(model, oracle) < 1e-12

    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure).item(), optimizer.step(closure).item()
    assert second < first


@on_ranks(0)
@with_each_strategy
def test_one_rank_trains_what_is_added_or_unfrozen_later(cluster, strategy):
    model, head = small_model(), torch.nn.Linear(3, 1).double()
    model[0].weight.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    optimizer.add_param_group({"params": head.parameters()})
    model[0].weight.requires_grad_(True)
    head(model(torch.ones(2, 6, dtype=torch.float64))).sum().backward()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (model[0].weight, head.weight)] == [1, 1]
