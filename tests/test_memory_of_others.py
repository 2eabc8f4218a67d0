"""Memory that others hold: views, tied tensors, NumPy arrays, saved dictionaries and swapped data.

Each scenario runs with torch.optim.Adam and with ours, in one process and on two ranks that have the same data.
Both must leave equal values in every tensor that it returns.
"""

import copy

import numpy as np
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import small_model
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute

OPTIONS = dict(lr=0.1, eps=1e-2)


def step(model, optimizer, number=0):
    optimizer.zero_grad()
    inputs = torch.linspace(-1, 1 + number, 24, dtype=torch.float64).view(4, 6)
    model(inputs).square().sum().backward()
    optimizer.step()


def views_and_ties(optimize):
    model = small_model()
    model.register_buffer("alias", model[0].weight.data)
    head = torch.nn.Linear(8, 3).double()
    head.weight.data = model[2].weight.data
    array, part, before = model[0].bias.detach().numpy(), model[2].bias.detach()[1:], model.state_dict()
    optimizer = optimize(model)
    after = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    for number in range(3):
        step(model, optimizer, number)
    moments = [state["exp_avg"] for state in copy.deepcopy(optimizer.state_dict()["state"]).values()]
    tensors = [model.alias, head.weight, torch.from_numpy(np.array(array)), part, *moments]
    return [*tensors, *before.values(), *after["model"].values(), *model.parameters()]


def swapped_data(optimize):
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(2))).double()
    for number, layer in enumerate(model):
        torch.nn.init.constant_(layer.weight, 0.1 + number)
        torch.nn.init.constant_(layer.bias, -0.2)
    optimizer = optimize(model)
    step(model, optimizer)
    for _ in range(2):
        model[0].weight.data, model[1].weight.data = model[1].weight.data, model[0].weight.data
        step(model, optimizer)
    return list(model.parameters())


def data_put_aside_and_back(optimize):
    model = small_model()
    optimizer = optimize(model)
    step(model, optimizer)
    old = model[0].weight.data
    model[0].weight.data = model[0].weight.data.clone()
    step(model, optimizer)
    model[0].weight.data = old
    step(model, optimizer)
    return [old, *model.parameters()]


def data_from_elsewhere(optimize):
    """`p.data` becomes a part of a larger tensor, whose other elements must not change."""
    model = small_model()
    optimizer = optimize(model)
    step(model, optimizer)
    around = torch.full((3, 8, 6), 7.0, dtype=torch.float64)
    around[1] = model[0].weight.data
    model[0].weight.data = around[1]
    for number in range(2):
        step(model, optimizer, number)
    return [around, *model.parameters()]


def channels_last_after_a_step(optimize):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 2, 3)), torch.nn.Conv2d(1, 4, 2), torch.nn.Flatten()
    ).double()
    optimizer = optimize(model)
    step(model, optimizer)
    model.to(memory_format=torch.channels_last)
    strides = model[1].weight.stride()
    for number in range(2):
        step(model, optimizer, number)
    assert model[1].weight.stride() == strides
    return list(model.parameters())


def options_changed_before_step(optimize):
    """Whatever makes another layout between `backward` and `step` must not add gradients twice."""
    model = small_model()
    optimizer = optimize(model)
    group = optimizer.param_groups[0]

    def change(number):
        if number in (1, 4):
            group["weight_decay"] = 0.1 if number == 1 else 0.0
        if number in (2, 3):  # PyTorch cannot add the third moment to a state
            group["amsgrad"] = number == 2
            optimizer.state.clear()

    for number in range(6):
        optimizer.zero_grad()
        model(torch.ones(4, 6, dtype=torch.float64)).square().sum().backward()
        change(number)
        optimizer.step()
    return list(model.parameters())


SCENARIOS = (
    *(views_and_ties, swapped_data, data_put_aside_and_back, data_from_elsewhere, channels_last_after_a_step),
    options_changed_before_step,
)


def expected_of(scenario):
    return [
        t.detach().clone()
        for t in scenario(lambda model: torch.optim.Adam(model.parameters(), foreach=False, **OPTIONS))
    ]


def assert_equal(found, expected):
    # A dozen steps of float64 with some 30 roundings each, of numbers of size 1; gradients follow the parameters.
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(
            ours.detach(), theirs, rtol=1e-10, atol=1e-10, msg=lambda text, i=i: f"{i}: {text}"
        )


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_in_one_process(scenario, implementation):
    found = scenario(lambda model: Adam(model.parameters(), implementation=implementation, **OPTIONS))
    assert_equal(found, expected_of(scenario))


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_on_ranks(cluster, strategy, scenario, implementation):
    def optimize(model):
        adam = Adam(model.parameters(), implementation=implementation, **OPTIONS)
        return distribute(adam, model, strategy=strategy)

    expected = expected_of(scenario)
    assert_equal(scenario(optimize), expected)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_gradients_that_a_user_keeps_do_not_change(implementation):
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = Adam([p], implementation=implementation)
    kept = []
    for number in range(1, 4):
        optimizer.zero_grad()
        (p * number).sum().backward()
        kept.append(p.grad)
        optimizer.step()
    assert [gradient.tolist() for gradient in kept] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


def test_large_models_are_not_moved_by_the_default_implementation():
    weight = torch.nn.Parameter(torch.ones(1 << 20))
    view, array = weight.detach(), weight.detach().numpy()
    optimizer = Adam([weight])
    weight.grad = torch.ones(1 << 20)
    optimizer.step()
    assert optimizer._store.implementations == ["fused"]
    assert torch.equal(view, weight.detach())
    assert (array == weight.detach().numpy()).all()
    assert (array < 1).all()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64, torch.int64], ids=str)
def test_frozen_parameters_of_any_dtype_do_not_turn_the_fused_kernel_off(kind):
    trained = torch.nn.Parameter(torch.ones(1 << 20))
    frozen = torch.nn.Parameter(torch.ones(4).to(kind), requires_grad=False)
    optimizer = Adam([frozen, trained])
    trained.grad = torch.ones(1 << 20)
    optimizer.step()
    assert optimizer._store.all_fused
    assert (trained < 1).all()
    assert torch.equal(frozen.to(torch.complex64), torch.ones(4, dtype=torch.complex64))


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_foreign_entries_and_unusual_step_counts_of_the_state_do_no_harm(implementation):
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    ours, theirs = Adam([p], implementation=implementation, lr=0.1), torch.optim.Adam([q], lr=0.1, foreach=False)
    for number in range(4):
        p.grad, q.grad = (torch.full((3,), number + 1.0, dtype=torch.float64) for _ in range(2))
        if number == 2:
            ours.state[p]["step"], theirs.state[q]["step"] = 7, torch.tensor(7.0)
        ours.step()
        theirs.step()
        ours.state[p].update(n=number, note=torch.tensor(1.0))
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert ours.state[p]["n"] == 3
