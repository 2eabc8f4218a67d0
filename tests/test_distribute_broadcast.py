"""After `distribute`, and after `broadcast`, every rank has rank 0's tensors and hyper-parameters, bit for bit.

Hazards: state and hyper-parameters that the wrapper loses; a broadcast that makes a step to create state; dtypes
and memory formats that Horovod does not support; state that only one rank has.
"""

import copy
from pathlib import Path

import horovod.torch as hvd
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import (
    digest,
    everything,
    same_everywhere,
    small_model,
    train,
    train_alone,
    whole_state,
)
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.distributed.broadcast.tensors import broadcast_nested, broadcast_tensors


@on_ranks(2)
@each_strategy
def test_after_distribute_every_rank_has_the_tensors_of_rank_0(cluster, strategy):
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
@each_strategy
def test_the_stock_broadcast_makes_a_step_and_distribute_makes_none(cluster, strategy):
    def steps_and_weights(stock):
        model = small_model()
        # Stock Horovod gets an optimizer that creates its state in the first step, as it expects.
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
@each_strategy
def test_state_on_rank_0_only_is_copied_to_all_ranks_and_training_continues_identically(cluster, strategy):
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
@each_strategy
def test_state_that_only_one_rank_has_for_a_frozen_parameter_becomes_that_of_rank_0(cluster, strategy):
    model = small_model()
    model[0].weight.requires_grad_(cluster.rank == 0)  # so that only rank 0 has state for it
    optimizer = Adam(model.parameters())
    model[0].weight.requires_grad_(True)
    optimizer = distribute(optimizer, model, strategy=strategy)
    assert same_everywhere(everything(model, optimizer))
    train(model, optimizer, cluster)
    assert same_everywhere(everything(model, optimizer))


@on_ranks(2)
@each_strategy
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
@each_strategy
def test_hyper_parameters_that_differ_become_those_of_rank_0_also_as_tensors(cluster, strategy):
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
@each_strategy
def test_every_hyper_parameter_and_the_state_are_kept_when_horovod_wraps_the_optimizer(cluster, strategy):
    model = small_model()
    adam = {"lr": 3e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}
    options = {"decoupled_weight_decay": True, "maximize": True, "implementation": "reference"}
    original = Adam(model.parameters(), **adam, **options)
    original.state[model[0].weight]["exp_avg"].fill_(0.25)
    optimizer = distribute(original, model, strategy=strategy)
    assert {key: optimizer.param_groups[0][key] for key in adam | options} == adam | options
    assert torch.all(whole_state(optimizer, model[0].weight)["exp_avg"] == 0.25)
    # Stock Horovod creates the object again, without its state.
    original = Adam(model.parameters(), **adam)
    original.state[model[0].weight]["exp_avg"].fill_(0.25)
    stock = hvd.DistributedOptimizer(original, model.named_parameters())
    assert torch.all(stock.state[model[0].weight]["exp_avg"] == 0)


@on_ranks(2)
@each_strategy
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
@each_strategy
def test_an_added_group_gets_the_values_of_rank_0_and_is_averaged(cluster, strategy):
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


def nested():
    """Returns containers with tensors of many kinds, one larger than the chunks that are sent."""
    large = torch.arange(24 << 20, dtype=torch.float32)
    nan = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)
    small = [torch.ones(3, dtype=torch.bfloat16), torch.tensor(7), torch.zeros(0), torch.ones(2, 3).t(), nan]
    return {"large": large, "model": {"small": small, "none": None}, "numbers": (1, 2.5, "text", True)}


def same_bits(mine, theirs):
    if isinstance(theirs, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (mine, theirs)]
        return (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape) and torch.equal(*bits)
    if isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(same_bits(mine[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return type(mine) is type(theirs) and all(map(same_bits, mine, theirs))
    return mine == theirs


def kilobytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@on_ranks(2)
def test_nested_containers_arrive_bit_for_bit_in_little_more_memory_than_their_own(cluster):
    broadcast_nested({"warm up": torch.ones(1 << 20)} if cluster.rank == 1 else None, "test.warm", root=1)
    value = nested() if cluster.rank == 1 else None
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak again
    received = broadcast_nested(value, "test.nested", root=1)
    grown = kilobytes("VmHWM") - before
    size = 96 << 10 if cluster.rank == 0 else 0
    assert grown < size + (32 << 10), grown
    assert same_bits(received, nested())


@on_ranks(2)
def test_a_backward_pass_through_values_that_a_broadcast_has_overwritten_fails(cluster):
    for elements in (10, 20 << 20):  # packed with others, and sent from where it lies
        p = torch.nn.Parameter(torch.full((elements,), 1.0 + cluster.rank))
        loss = (p * p).sum()
        broadcast_tensors([p], f"test.version.{elements}")
        assert torch.equal(p.detach(), torch.ones(elements))
        if cluster.rank:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
