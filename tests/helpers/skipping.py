"""Small training runs with nonfinite gradients, and the check that all ranks skip such updates."""

import itertools
import math

import torch

from hvd_adam import Adam, distribute


def made(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return model, distribute(Adam(model.parameters(), lr=0.1), model, **options)


def update(model, optimizer, factor=1.0, accumulate=1):
    optimizer.zero_grad()
    for _ in range(accumulate):
        (model(torch.ones(2, 6)).square().sum() * factor).backward()
        optimizer.step()


def snapshot(model, optimizer):
    state = optimizer.state_dict()["state"]
    tensors = [*model.state_dict().values(), *(value for entry in state.values() for value in entry.values())]
    return [tensor.clone() for tensor in tensors]


def check_skipping(cluster, options):
    """Checks that NaN and infinity on the first or last rank leave model and optimizer unchanged on all ranks."""
    accumulate = options.get("accumulate", 1)
    model, optimizer = made(**options)
    update(model, optimizer, accumulate=accumulate)
    before = snapshot(model, optimizer)
    for skipped, (value, rank) in enumerate(
        itertools.product((math.nan, math.inf), (0, cluster.size - 1)), start=1
    ):
        update(model, optimizer, value if cluster.rank == rank else 1.0, accumulate)
        assert optimizer.skipped_updates == skipped
        assert all(map(torch.equal, before, snapshot(model, optimizer)))
    update(model, optimizer, accumulate=accumulate)
    assert optimizer.skipped_updates == skipped
    assert not any(map(torch.equal, before, snapshot(model, optimizer)))
    return snapshot(model, optimizer)
