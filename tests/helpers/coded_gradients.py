"""Models without a computation, their gradients, and what updates have not received, for tests of codes."""

import pytest
import torch

from helpers.small_training import digest
from hvd_adam import Adam, distribute

each_code = pytest.mark.parametrize("compression", ["int8", "int4"])


class Weights(torch.nn.Module):
    """Some parameters without a computation."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


def backward(model, gradients, scale=1.0):
    """Gives the parameters of a model these gradients, as a loss does that is linear in them."""
    sum(
        (p * gradients[name]).sum() * scale for name, p in model.named_parameters() if name in gradients
    ).backward()


def random_gradients(model, seed, rank=0):
    """Gradients that differ between parameters in magnitude; the same for the same seed and rank."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return {
        name: torch.randn(p.shape, generator=generator) * 10.0**i
        for i, (name, p) in enumerate(model.named_parameters())
    }


def mean_of_ranks(model, seed, size):
    """Returns the mean of `random_gradients` over the ranks, in float64."""
    of_ranks = [random_gradients(model, seed, rank) for rank in range(size)]
    return {name: sum(g[name].double() for g in of_ranks) / size for name in of_ranks[0]}


def unsent(optimizer):
    """Returns what updates have not received yet, by name; the same on all ranks."""
    return {n: r[0].double() for n, r in optimizer.error_feedback.total_state_dict()["parked"].items()}


def residuals(optimizer):
    """Returns a hash of the residuals of all ranks; on rank 0."""
    return digest(optimizer.error_feedback.state_dict_on_root())


class Account:
    """Compares the means that updates should have got with those they have got: residuals are the difference."""

    def __init__(self, cluster, model, optimizer):
        self.cluster, self.model, self.optimizer = cluster, model, optimizer
        self.missing = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}

    def backward(self, seed, names=None, retain=False):
        names = names or [name for name, p in self.model.named_parameters() if p.requires_grad]
        gradients = random_gradients(self.model, seed, self.cluster.rank)
        backward(self.model, {name: gradients[name] for name in names})
        for name, mean in mean_of_ranks(self.model, seed, self.cluster.size).items():
            if name in names:
                self.missing[name] += mean

    def step(self):
        if self.optimizer._strategy.scatters:
            self.optimizer.synchronize()  # whole gradients, on every rank
        self.optimizer.step()
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                self.missing[name] -= p.grad.double()
        self.optimizer.zero_grad()

    def update(self, seed, names=None):
        self.backward(seed, names)
        self.step()

    def check(self):
        found = unsent(self.optimizer)
        assert any(residual.any() for residual in found.values())
        for name, residual in found.items():
            i = [*self.missing].index(name)
            assert (residual - self.missing[name]).abs().max() < 1e-4 * 10.0**i, name


SHAPES = {"first": (17, 30), "bias": (40,), "second": (33, 20), "third": (9, 70)}


def account(cluster, compression, **options):
    model = Weights(**SHAPES)
    return Account(cluster, model, distribute(Adam(model.parameters()), model, compression=compression, **options))
