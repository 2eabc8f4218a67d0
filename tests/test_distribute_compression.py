"""Gradients of every dtype, memory format and compression are averaged within their rounding.

Hazards: half-precision sums that overflow; bfloat16 gradients and channels-last gradients, which Horovod does not
support.
"""

import copy
import gc

import horovod.torch as hvd
import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.small_training import digest, same_everywhere, small_model, train
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute
from hvd_adam.distributed.collectives import pieces


@on_ranks(2)
@each_strategy
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
@each_strategy
def test_a_float16_sum_that_overflows_in_stock_horovod_is_averaged(cluster, strategy):
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
@each_strategy
def test_the_error_of_compression_is_within_its_rounding(cluster, strategy):
    for compression, unit in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):  # unit roundoff: 11 and 8 significant bits
        for dtype in (torch.float32, torch.float64):
            model = torch.nn.Linear(1, 1001, bias=False).to(dtype)  # not a multiple of the number of ranks
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
@each_strategy
def test_bf16_compression_averages_gradients_beyond_the_range_of_float16(cluster, strategy):
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = distribute(Adam(model.parameters()), model, compression="bf16", strategy=strategy)
    (model.weight * 2.0**100).sum().backward()
    optimizer.synchronize()
    assert model.weight.grad[0].tolist() == [2.0**100] * 3


@on_ranks(2)
@each_strategy
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


@on_ranks(2, 3)
@each_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pieces_of_bf16_have_the_bits_of_whole_buckets(cluster, strategy, dtype):
    results = []
    for piece in (1 << 20, 96, 160):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE", piece)
            patch.setattr(pieces, "LEAST_OF_PART", 8)
            model = small_model(dtype)
            optimizer = distribute(Adam(model.parameters()), model, strategy=strategy, compression="bf16")
            train(model, optimizer, cluster)
            results.append(digest(*model.parameters()))
    assert len(set(results)) == 1


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("compression", ["none", "fp16", "bf16", "int8"])
def test_memory_of_an_update_is_freed_without_the_garbage_collector(cluster, strategy, compression):
    for deferred in (False, True):
        model = small_model(torch.float32)
        options = {"compression": compression, "strategy": strategy, "defer_averaging": deferred}
        optimizer = distribute(Adam(model.parameters()), model, **options)
        train(model, optimizer, cluster, steps=3)
        gc.collect()
        gc.disable()
        train(model, optimizer, cluster, steps=3)
        unreachable = gc.collect()
        gc.enable()
        assert unreachable == 0
