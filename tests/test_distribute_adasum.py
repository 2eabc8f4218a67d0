"""Adasum: ranks stay identical, and options that it does not support are refused.

Hazards: the sum over micro-batches in place of the mean; updates of unused parameters through zero gradients.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.branching_model import Branches
from helpers.on_ranks import on_ranks
from helpers.small_training import batches, digest, largest_difference, same_everywhere, share, small_model

from hvd_adam import Adam, distribute


@on_ranks(2, "mpi")
def test_adasum_keeps_ranks_identical_and_reduces_the_loss(cluster):
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
def test_adasum_of_equal_updates_is_that_update_and_unused_parameters_are_not_updated(cluster):
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
def test_ranks_may_use_different_parameters_and_a_rank_may_have_no_loss(cluster):
    model = Branches()
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    before = digest(model.state_dict())
    for update, (inputs, _) in enumerate(batches(3, 8)):
        optimizer.zero_grad()
        if update or cluster.rank == 0:
            model(inputs, "left" if cluster.rank else "right").square().mean().backward()
        optimizer.step()
        assert same_everywhere(digest(model.state_dict()))
    assert digest(model.state_dict()) != before


@on_ranks(2, "mpi")
def test_adasum_refuses_synchronize(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    with pytest.raises(RuntimeError, match="adasum combines updates"):
        optimizer.synchronize()


@on_ranks(2, "mpi")
def test_adasum_refuses_a_parameter_unfrozen_after_distribute(cluster):
    model = small_model()
    model[0].weight.requires_grad_(False)
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    model[0].weight.requires_grad_(True)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight has a gradient but was frozen"):
        optimizer.step()
    model[0].weight.grad = None
    optimizer.step()
