"""Clipping and loss scaling use the averaged, unscaled gradient, and skip updates on all ranks together.

Hazards: a norm of one rank's gradient; a clip before the average; an overflow on one rank only; a norm
that depends on the strategy, the number of ranks or micro-batches or the loss scale, or is that of another update.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.on_ranks import on_ranks
from helpers.small_training import (
    batches,
    digest,
    largest_difference,
    share,
    small_model,
    train,
    train_alone,
    whole_state,
)
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute


@on_ranks(2)
@each_strategy
def test_clipping_uses_the_norm_of_the_averaged_gradient(cluster, strategy):
    model = torch.nn.Linear(1, 1, bias=False).double()
    optimizer = distribute(Adam(model.parameters()), model, max_grad_norm=1.0, strategy=strategy)
    (model.weight * (8.0 if cluster.rank else -4.0)).sum().backward()
    optimizer.step()
    assert optimizer.grad_norm.item() == 2.0
    first_moment = whole_state(optimizer, model.weight)["exp_avg"].item()  # 0.1 of the clipped gradient
    assert abs(first_moment - 0.1) < 1e-6  # clip_grad_norm_ divides by norm + 1e-6


@on_ranks(2)
@each_strategy
def test_loss_scaling_changes_only_the_range_and_skips_on_all_ranks_together(cluster, strategy):
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
        factor = float("inf") if cluster.rank == 1 else 1.0  # overflow on one rank only
        scaler.scale(model(torch.ones(1, 6, dtype=torch.float64)).sum() * factor).backward()
        optimizer.step()
    assert digest(model.state_dict()) == before
    assert optimizer.state[model[0].weight]["step"].item() == steps
    assert scaler.get_scale() == 2.0**9
    assert optimizer.skipped_updates == 1

    optimizer.zero_grad()
    for _ in range(2):  # without a gradient nothing is updated, as without a scaler
        optimizer.step()
    assert digest(model.state_dict()) == before
    train(model, optimizer, cluster, micro_batches=2, scaler=scaler)
    assert optimizer.skipped_updates == 1


@on_ranks(1, 2)
@pytest.mark.parametrize("strategy", ["allreduce", "sharded"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e-3}, {"accumulate": 2}, {"scale": 512.0}])
def test_the_norm_of_the_last_update_is_that_of_one_process(cluster, strategy, options):
    options = dict(options)
    scale, accumulate = options.pop("scale", None), options.get("accumulate", 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    model, single = small_model(), small_model()
    optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, loss_scaler=scaler, **options)
    for batch in batches(2, 16):
        single.load_state_dict(model.state_dict())
        optimizer.zero_grad()
        for inputs, targets in share(batch, cluster, accumulate):
            loss = F.mse_loss(model(inputs), targets)
            (scaler.scale(loss) if scaler else loss).backward()
            optimizer.step()
        single.zero_grad()
        F.mse_loss(single(batch[0]), batch[1]).backward()
        expected = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in single.parameters()]))
        assert optimizer.finite_grad_norm() == pytest.approx(expected.item(), rel=1e-12)


@on_ranks(1, 2)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}])
def test_without_a_gradient_or_after_a_skipped_update_there_is_no_norm(cluster, options):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, **options)
    assert optimizer.finite_grad_norm() is None
    for value, finite in ((1.0, True), (math.inf, False)):
        optimizer.zero_grad()
        model(torch.full((4, 6), value, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert (optimizer.finite_grad_norm() is not None) == finite


@on_ranks(2, "mpi")
def test_adasum_has_no_norm(cluster):
    model = small_model()
    optimizer = distribute(Adam(model.parameters()), model, op="adasum")
    model(torch.ones(4, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.finite_grad_norm() is None
