"""Training with local steps, and its oracle, for tests on real ranks."""

import copy

import torch
import torch.nn.functional as F

from helpers.small_training import batches, share, small_model
from hvd_adam import Adam, distribute


def wide_model(seed=0, dtype=torch.float32):
    """Weights of which codes are sent, biases and buffers."""
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(6, 64), torch.nn.BatchNorm1d(64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    return torch.nn.Sequential(*layers).to(dtype)


def local(model, local_steps=3, lr=0.01, **options):
    options = {"outer_lr": 0.7, "outer_momentum": 0.9, **options}
    return distribute(Adam(model.parameters(), lr=lr), model, strategy="local", local_steps=local_steps, **options)


def step(model, optimizer, inputs, targets):
    optimizer.zero_grad()
    F.mse_loss(model(inputs), targets).backward()
    optimizer.step()


def train(model, optimizer, cluster, steps, skip=0, samples=24):
    """Trains on this rank's share of each global batch."""
    for number, batch in enumerate(batches(steps, samples, next(model.parameters()).dtype)):
        if number >= skip:
            step(model, optimizer, *share(batch, cluster)[0])


def oracle(ranks, steps, local_steps, lr, momentum, samples=24):
    """Trains islands in one process: PyTorch's Adam and SGD, in float64. Returns the outer weights."""
    outer = small_model()
    sgd = torch.optim.SGD(outer.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    islands = [copy.deepcopy(outer) for _ in range(ranks)]
    adams = [torch.optim.Adam(island.parameters(), lr=0.01, foreach=False) for island in islands]
    for number, batch in enumerate(batches(steps, samples), 1):
        for island, adam, inputs, targets in zip(islands, adams, *(t.chunk(ranks) for t in batch), strict=True):
            step(island, adam, inputs, targets)
        if number % local_steps == 0:
            for p, *own in zip(outer.parameters(), *(island.parameters() for island in islands), strict=True):
                p.grad = torch.stack([p.detach() - q.detach() for q in own]).mean(dim=0)
            sgd.step()
            for island in islands:
                island.load_state_dict(outer.state_dict())
    return outer


def resumed(cluster, saved, weights, **options):
    """Returns a model and an optimizer that continue from a checkpoint, as a new process would."""
    model = wide_model(seed=5)
    if cluster.is_root:
        model.load_state_dict(weights)
    optimizer = local(model, **options)
    optimizer.load_islands(saved)
    return model, optimizer


def save(model, optimizer):
    with optimizer.outer_weights():
        weights = copy.deepcopy(model.state_dict())
    return copy.deepcopy(optimizer.islands_on_root()), weights
