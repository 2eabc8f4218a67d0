"""Ranks that train on the same batches are noticed in the first updates, and others are not warned of anything.

Hazards: a loader that ignores the rank and goes unnoticed; a warning about constant data, losses without data or
    ranks without batches; costs after the first update; hooks that stay in the model, or in its copies.
"""

import copy
import warnings

import pytest
import torch
from helpers.on_ranks import on_ranks
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hvd_adam import Adam, distribute
from hvd_adam.distributed.gradients import same_batches

UPDATES = 8


class Model(torch.nn.Module):
    """A model that takes a dictionary, as many language models do, and has parts that a loop may call."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(50, 6), torch.nn.Linear(6, 4)
        self.dropout = torch.nn.Dropout(0.2)
        self.scripted = torch.jit.script(torch.nn.Identity())  # takes no hooks

    def forward(self, batch, scale=1.0):
        return self.head(self.dropout(self.embed(batch["tokens"]).mean(dim=1))) * scale


def batches(sampler=None):
    """Yields batches as a script would make them; the seed is the same on all ranks."""
    torch.manual_seed(0)
    loader = DataLoader(
        TensorDataset(torch.randint(50, (64, 5))), batch_size=8, shuffle=not sampler, sampler=sampler
    )
    while True:
        yield from ({"tokens": tokens} for (tokens,) in loader)


def shares(cluster):
    return batches(DistributedSampler(range(64), num_replicas=cluster.size, rank=cluster.rank))


def run(model, optimizer, loss, micro_batches=1):
    """Trains; returns the warnings about batches."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(UPDATES):
            for _ in range(micro_batches):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
    return [str(warning.message) for warning in found if "same batches" in str(warning.message)]


def whole(model, data):
    return lambda: model(next(data)).square().sum()


def keywords(model, data):
    return lambda: model(scale=2.0, batch=next(data)).square().sum()


def parts(model, data):
    return lambda: model.head(model.embed(next(data)["tokens"]).mean(dim=1)).square().sum()


def constant(model, data):
    batch = next(data)
    return lambda: model(batch).square().sum()


def without_data(model, data):
    return lambda: sum(p.square().sum() for p in model.parameters())


def without_data_through_the_model(model, data):
    return lambda: model.head(model.embed.weight).square().sum()


@on_ranks(2)
@pytest.mark.parametrize("loop", [whole, keywords, parts])
@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "sharded", "defer_averaging": True}, {"accumulate": 2, "compression": "bf16"}],
    ids=str,
)
def test_a_loader_that_ignores_the_rank_is_noticed_once_on_rank_0(cluster, loop, options):
    model = Model()
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model, **options)
    found = run(model, optimizer, loop(model, batches()), options.get("accumulate", 1))
    assert len(found) == (cluster.rank == 0)
    assert all("2 ranks do the work of one" in text and "rank=cluster.rank" in text for text in found)
    assert not any(module._forward_pre_hooks for module in model.modules())


@on_ranks(2)
@pytest.mark.parametrize("loop", [constant, without_data, without_data_through_the_model])
def test_constant_data_and_losses_without_data_are_no_mistake(cluster, loop):
    model = Model()
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model)
    assert not run(model, optimizer, loop(model, batches()))
    assert not any(module._forward_pre_hooks for module in model.modules())


@on_ranks(2)
def test_ranks_with_their_own_batches_look_at_one_gradient_and_at_nothing_later(cluster):
    model = Model()
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model)
    looked = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        original = same_batches._checksum
        monkeypatch.setattr(same_batches, "_checksum", lambda tensors: (looked.append(1), original(tensors))[1])
        assert not run(model, optimizer, whole(model, shares(cluster)))
    assert len(looked) == 1


@on_ranks(2)
def test_a_copy_of_a_model_that_is_being_looked_at_is_independent(cluster):
    model = Model()
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model)
    data, copies = batches(), []

    def loss():
        copies.append(copy.deepcopy(model))
        copies[-1](next(batches()))  # not the batch of the update
        return whole(model, data)()

    assert len(run(model, optimizer, loss)) == (cluster.rank == 0)
    assert any(each._forward_pre_hooks for each in copies)


@on_ranks(2)
def test_a_rank_without_a_batch_is_no_mistake(cluster):
    model = Model()
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model)
    data = batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for update in range(UPDATES):
            optimizer.zero_grad()
            if update or cluster.rank:
                model(next(data)).square().sum().backward()
            optimizer.step()


def test_a_checksum_depends_on_all_parts_of_a_large_tensor_and_not_on_zeros():
    tensor = torch.randn(3, same_batches.SAMPLES // 2)
    seen = {same_batches._checksum([tensor])}
    for row in range(3):
        for change in range(20):
            other = tensor.clone()
            other[row] *= 1 + 1e-6 * (change + 1)
            seen.add(same_batches._checksum([other]))
    assert len(seen) > 40
    assert same_batches._checksum([torch.zeros(3)]) is None
    assert same_batches._checksum([torch.ones(3, dtype=torch.float8_e5m2)]) is not None
