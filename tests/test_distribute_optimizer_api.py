"""The result of `distribute` is a `torch.optim.Optimizer`.

Hazards: hooks that are called twice, as by stock Horovod, or not at all; subclasses with a `step` that recurses;
gradients that are cleared in flight; parameters that are added or unfrozen later.
"""

import sys
import warnings

import horovod.torch as hvd
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import small_model, train
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute


@on_ranks(2)
@each_strategy
def test_schedulers_step_hooks_and_state_dicts_work(cluster, strategy):
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
@each_strategy
def test_hooks_registered_before_distribute_are_called(cluster, strategy):
    model, calls = small_model(), []
    adam = Adam(model.parameters())
    adam.register_step_post_hook(lambda *_: calls.append("post"))
    handle = adam.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer = distribute(adam, model, strategy=strategy)
    train(model, optimizer, cluster, steps=1)
    handle.remove()
    train(model, optimizer, cluster, steps=1)
    assert calls == ["pre", "post", "post"]


@on_ranks(1, 2)
@each_strategy
def test_a_parameter_that_is_removed_from_its_group_is_no_longer_updated(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters(), lr=0.1), model, strategy=strategy)
    train(model, optimizer, cluster, steps=1)
    removed = optimizer.param_groups[0]["params"].pop()
    before, other = removed.detach().clone(), model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the gradient is this rank's own
        train(model, optimizer, cluster, steps=1)
    assert torch.equal(removed, before) and not torch.equal(model[0].weight, other)


@on_ranks(2)
def test_step_hooks_of_stock_horovod_are_called_twice(cluster):
    model = small_model()
    stock = hvd.DistributedOptimizer(Adam(model.parameters()), model.named_parameters())
    calls = []
    stock.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, stock, cluster, steps=1)
    assert calls == ["post", "post"]


@on_ranks(2)
@each_strategy
def test_zero_grad_accepts_set_to_none_and_refuses_gradients_in_flight(cluster, strategy):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, defer_averaging=True)
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
@each_strategy
def test_subclasses_of_adam_and_of_the_distributed_optimizer_work(cluster, strategy):
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
    sys.setrecursionlimit(300)  # each recursion reduces all gradients
    try:
        with pytest.raises(RecursionError):
            stock.step()
    finally:
        sys.setrecursionlimit(limit)


@on_ranks(0)
@each_strategy
def test_one_rank_trains_parameters_added_or_unfrozen_later(cluster, strategy):
    model, head = small_model(), torch.nn.Linear(3, 1).double()
    model[0].weight.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    optimizer.add_param_group({"params": head.parameters()})
    model[0].weight.requires_grad_(True)
    head(model(torch.ones(2, 6, dtype=torch.float64))).sum().backward()
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (model[0].weight, head.weight)] == [1, 1]
