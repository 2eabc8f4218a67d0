"""Gradient accumulation: the mean over micro-batches, on one rank and on several.

Hazards: the sum in place of the mean, as in stock Horovod; gradients that are cleared between micro-batches.
"""

import horovod.torch as hvd
import pytest
import torch
import torch.nn.functional as F
from helpers.on_ranks import on_ranks
from helpers.small_training import batches, largest_difference, share, small_model, train, train_alone
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute


@on_ranks(2)
@each_strategy
def test_accumulation_computes_the_mean_where_stock_horovod_computes_the_sum(cluster, strategy):
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
@each_strategy
def test_zero_grad_between_micro_batches_keeps_the_accumulated_gradient(cluster, strategy):
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


@on_ranks(2)
@each_strategy
def test_a_float16_sum_over_micro_batches_does_not_overflow(cluster, strategy):
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = distribute(Adam(model.parameters()), model, compression="fp16", accumulate=8, strategy=strategy)
    for _ in range(8):
        (model.weight * 2e4).sum().backward()
        if optimizer._averager.micro_batch < 7:
            optimizer.step()
    optimizer.synchronize()
    assert model.weight.grad[0].tolist() == [2e4] * 3


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="no loss scaler for CPUs before PyTorch 2.3")
@on_ranks(0)
@each_strategy
def test_one_rank_accumulates_clips_scales_and_accepts_a_closure(cluster, strategy):
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
