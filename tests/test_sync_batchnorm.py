"""`SyncBatchNorm`: N ranks normalize as one rank does with the whole batch.

Hazards: means of means where ranks have different numbers of samples; a gradient without the part of other ranks;
running statistics with the wrong count; options (momentum None, no affine part, no statistics) lost in conversion.
"""

import copy

import pytest
import torch
from helpers.on_ranks import on_ranks

from hvd_adam import Adam, distribute
from hvd_adam.distributed.sync_batchnorm import SyncBatchNorm, convert


def small_model(**options):
    torch.manual_seed(0)
    # No bias before a normalization: its gradient consists of rounding errors, which Adam would enlarge.
    first, last = torch.nn.Conv2d(2, 3, 3, bias=False), torch.nn.Linear(48, 4, bias=False)
    norms = torch.nn.BatchNorm2d(3, **options), torch.nn.BatchNorm1d(4, **options)
    layers = first, norms[0], torch.nn.Tanh(), torch.nn.Flatten(), last, norms[1]
    return torch.nn.Sequential(*layers).double()


def whole_batches(samples):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(samples, 2, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False})


@on_ranks(2)
def test_two_ranks_train_as_one_rank_with_the_whole_batch(cluster):
    for options in OPTIONS:
        model, oracle = convert(small_model(**options)), small_model(**options)
        optimizer = distribute(Adam(model.parameters(), lr=1e-2), model)
        reference = torch.optim.Adam(oracle.parameters(), lr=1e-2)
        for batch in whole_batches(8):
            reference.zero_grad()
            oracle(batch).pow(3).mean().backward()
            reference.step()
            optimizer.zero_grad()
            model(batch.chunk(2)[cluster.rank]).pow(3).mean().backward()
            optimizer.step()
        for name, expected in oracle.state_dict().items():
            found, message = model.state_dict()[name], f"{options} {name}"
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=message)
        torch.testing.assert_close(model.eval()(batch), oracle.eval()(batch), rtol=1e-9, atol=1e-11)


@on_ranks(2)
def test_ranks_with_different_numbers_of_samples_are_weighted_by_samples(cluster):
    layer, oracle = convert(torch.nn.BatchNorm1d(3)).double(), torch.nn.BatchNorm1d(3).double()
    batch = torch.randn(8, 3, dtype=torch.float64)
    part = batch[:2] if cluster.rank == 0 else batch[2:]
    expected = oracle(batch)[:2] if cluster.rank == 0 else oracle(batch)[2:]
    torch.testing.assert_close(layer(part), expected, rtol=1e-12, atol=1e-12)


@on_ranks(2)
def test_bfloat16_images_are_normalized_in_float32(cluster):
    layer = convert(torch.nn.BatchNorm2d(3))
    output = layer(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16) + 100)
    assert output.dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.float32
    assert output.float().mean().abs() < 0.05


@on_ranks(0)
def test_on_one_rank_it_equals_batch_norm_of_pytorch(cluster):
    model = small_model()
    converted = convert(copy.deepcopy(model))
    (batch, *_) = whole_batches(4)
    assert torch.equal(converted(batch), model(batch))
    assert [type(layer) for layer in converted if isinstance(layer, SyncBatchNorm)] == [SyncBatchNorm] * 2
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        converted[1](batch[0, 0, 0])
