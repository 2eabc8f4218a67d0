"""Habits that loops bring: compiled steps, hooks that take gradients away, entries of their own in the state."""

import copy

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.strategies import each_strategy
from torch import nn

from hvd_adam import Adam, distribute
from hvd_adam.errors import UserError

OPTIONS = dict(lr=0.05, eps=1e-2)


def _model_and_reference(strategy, **options):
    """Returns a model with its distributed optimizer, and a copy with PyTorch's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    reference = copy.deepcopy(model)
    theirs = torch.optim.Adam(reference.parameters(), foreach=False, **OPTIONS)
    ours = distribute(Adam(model.parameters(), **OPTIONS), model, strategy=strategy, **options)
    return model, ours, reference, theirs


def _step(model, optimizer, rows):
    optimizer.zero_grad()
    model(rows).square().mean().backward()
    optimizer.step()


def _rows(cluster, seed):
    return torch.randn(4 * cluster.size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _assert_equal(model, reference):
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@on_ranks(2)
def test_a_compiled_function_may_contain_the_whole_step(cluster):
    model, ours, reference, theirs = _model_and_reference("sharded")
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_step, backend=backend)
    for seed in range(3):
        rows = _rows(cluster, seed)
        compiled(model, ours, rows[cluster.rank :: cluster.size])
        _step(reference, theirs, rows)
    _assert_equal(model, reference)
    assert len(graphs) == 1  # the forward pass; no hook and no part of the optimizer


@pytest.mark.multirank  # it compiles
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_a_step_in_a_compiled_function_is_adams(implementation):
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer, reference = Adam([ours], implementation=implementation), torch.optim.Adam([theirs], foreach=False)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        for p in (ours, theirs):
            p.grad = p.detach() ** 2
        step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@on_ranks(2)
@each_strategy
def test_a_hook_may_take_the_gradient_away(cluster, strategy):
    model, ours, reference, theirs = _model_and_reference(strategy)
    for net in (model, reference):
        net[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for seed in range(2):
        rows = _rows(cluster, seed)
        _step(model, ours, rows[cluster.rank :: cluster.size])
        _step(reference, theirs, rows)
    _assert_equal(model, reference)


@on_ranks(2)
@each_strategy
def test_entries_of_the_user_stay_in_the_state(cluster, strategy):
    model, ours, _, _ = _model_and_reference(strategy)
    model[2].requires_grad_(False)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    ours.state["global"]["n"] = 5
    ours.state[frozen] = {"note": 1}
    ours.state["number"] = 0.5
    ours.state[model[0].weight]["ema"] = torch.ones(3)
    for seed in range(2):
        _step(model, ours, _rows(cluster, seed))
    ours.broadcast()
    del ours.state[frozen]
    ours.load_state_dict(ours.state_dict())
    _step(model, ours, _rows(cluster, 2))
    assert ours.state["global"] == {"n": 5}
    assert ours.state["number"] == 0.5
    assert torch.equal(ours.state[model[0].weight]["ema"], torch.ones(3, dtype=torch.float64))
    assert ours.state[model[0].weight]["step"] == 3


def test_a_saved_state_with_entries_of_the_user_is_loaded_with_them():
    p, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Adam([p, frozen])
    optimizer.state[p]["calls"] = 7
    optimizer.state[frozen]["note"] = 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[p]["calls"] == 7
    assert optimizer.state[frozen] == {"note": 1}


@on_ranks(2)
@each_strategy
def test_groups_that_would_part_the_ranks_are_refused(cluster, strategy):
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Embedding(4, 3, max_norm=1.0)])
    optimizer = distribute(Adam(model[0].parameters()), model, strategy=strategy)
    with pytest.raises(TypeError, match="in order"):
        optimizer.add_param_group({"params": set(model[1].parameters())})
    with pytest.raises(UserError, match="max_norm"):
        optimizer.add_param_group({"params": list(model[2].named_parameters())})


class Tagged(nn.Parameter):
    """A parameter that redefines no operation."""


class Scaled(nn.Parameter):
    """A parameter that redefines operations."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@on_ranks(2)
@each_strategy
def test_parameters_of_a_class_of_the_user_are_averaged_if_they_are_plain(cluster, strategy):
    model, ours, reference, theirs = _model_and_reference(strategy)
    model[0].weight = Tagged(model[0].weight.detach())
    ours = distribute(Adam(model.parameters(), **OPTIONS), model, strategy=strategy)
    rows = _rows(cluster, 0)
    _step(model, ours, rows[cluster.rank :: cluster.size])
    _step(reference, theirs, rows)
    _assert_equal(model, reference)
    model[0].weight = Scaled(model[0].weight.detach())
    with pytest.raises(UserError, match=r"0\.weight is a Scaled"):
        distribute(Adam(model.parameters(), **OPTIONS), model, strategy=strategy)


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_large_finite_gradients_do_not_skip_the_update(cluster, strategy, dtype):
    model = nn.ParameterList([nn.Parameter(torch.zeros(4, dtype=dtype))])
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy)
    large = 1.7e308 if dtype == torch.float64 else 3e38
    model[0].grad = torch.full((4,), large, dtype=dtype)  # the sums overflow
    optimizer.step()
    assert optimizer.skipped_updates == 0
    assert torch.equal(model[0].grad, torch.full((4,), large, dtype=dtype))


@on_ranks(2)
def test_gradients_cleared_on_one_rank_end_the_job_although_the_others_wait_for_a_norm(cluster):
    from horovod.common.exceptions import HorovodInternalError

    model, ours, _, _ = _model_and_reference("sharded", max_grad_norm=1.0)
    with pytest.raises(HorovodInternalError) as caught:
        for seed in range(2):
            ours.zero_grad()
            model(_rows(cluster, seed)).sum().backward()
            if cluster.rank == 0:
                model.zero_grad()
            ours.step()
    assert ("wait for gradients" if cluster.rank == 0 else "this rank is in step()") in str(caught.value)
