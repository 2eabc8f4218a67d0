"""Random sequences of what users do to models and optimizers, each next to torch.optim.Adam in float64.

After every operation all parameters, gradients, state tensors, and all tensors that the test still holds from
before must be equal. On several ranks all have the same data, so that the mean is what one process computes.

HVD_ADAM_FUZZ=500 HVD_ADAM_LAUNCH_SECONDS=2000 runs more sequences than the default.
"""

import copy
import os
import random

import pytest
import torch
from helpers.on_ranks import on_ranks
from helpers.strategies import each_strategy

from hvd_adam import Adam, distribute

SEQUENCES = int(os.environ.get("HVD_ADAM_FUZZ", "30"))
OPERATIONS = 25
OPTIONS = dict(lr=0.05, eps=1e-2, weight_decay=0.01)


class World:
    """A model with its optimizer, and tensors that somebody holds."""

    def __init__(self, optimize):
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4)).double()
        self.added = 3  # layers in the optimizer
        self.held = {}
        self.optimizer = optimize(self.layers, list(self.layers[: self.added].parameters()))
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def params(self):
        return list(self.layers[: self.added].parameters())

    # What users do. Numbers are the same in both worlds.

    def backward(self, n):
        x = torch.linspace(-1, 1 + n % 3, 12, dtype=torch.float64).view(3, 4)
        for layer in self.layers[: self.added]:
            x = torch.tanh(layer(x))
        if x.requires_grad:
            (x.square().sum() * (1 + n % 2)).backward()

    def step(self, n):
        self.optimizer.step()

    def zero_grad(self, n):
        self.optimizer.zero_grad(set_to_none=bool(n % 2))

    def clear_gradients_of_the_model(self, n):
        self.layers.zero_grad()

    def add_group(self, n):
        if self.added < len(self.layers):
            self.optimizer.zero_grad()
            self.optimizer.add_param_group({"params": list(self.layers[self.added].parameters()), "lr": 0.02})
            self.added += 1

    def freeze(self, n):
        self.layers[n % self.added].requires_grad_(False)

    def unfreeze(self, n):
        self.layers.requires_grad_(True)

    def swap_data(self, n):
        a, b = self.layers[n % 3].weight, self.layers[(n + 1) % 3].weight
        a.data, b.data = b.data, a.data

    def replace_data(self, n):
        p = self.params()[n % 6]
        self.held[f"old data {n}"] = p.data
        p.data = p.data.clone() * 0.9

    def change_in_place(self, n):
        with torch.no_grad():
            self.params()[n % 6].mul_(0.9)

    def transpose_memory(self, n):
        p = self.layers[n % 3].weight
        p.data = p.data.t().contiguous().t()

    def alias(self, n):
        self.held[f"alias {n}"] = self.params()[n % 6].detach()

    def change_gradient(self, n):
        for p in self.params()[n % 3 :: 2]:
            if p.grad is not None:
                p.grad.mul_(0.5)

    def replace_gradient(self, n):
        p = self.params()[n % 6]
        if p.grad is not None:
            p.grad = p.grad * 2

    def change_options(self, n):
        group = self.optimizer.param_groups[0]
        group.update(weight_decay=(0.0, 0.1, 0.01)[n % 3], lr=(0.05, 0.02)[n % 2], maximize=n % 5 == 0)

    def clear_state(self, n):
        self.optimizer.param_groups[0]["amsgrad"] = bool(n % 2)  # PyTorch cannot change it with a state
        self.optimizer.state.clear()

    def save(self, n):
        self.saved = copy.deepcopy(self.optimizer.state_dict())

    def load(self, n):
        fits = len(self.saved["param_groups"]) == len(self.optimizer.param_groups)
        if fits and self.saved["param_groups"][0]["amsgrad"] == self.optimizer.param_groups[0]["amsgrad"]:
            self.optimizer.load_state_dict(copy.deepcopy(self.saved))

    def copy_model(self, n):
        duplicate = copy.deepcopy(self.layers)
        self.held |= {f"copy {n} {name}": p.detach() for name, p in duplicate.named_parameters()}

    def keep_gradient(self, n):
        p = self.params()[n % 6]
        if p.grad is not None:
            self.held[f"gradient {n}"] = p.grad
            p.grad = None

    # What they see.

    def seen(self):
        """Returns all tensors by name, None for missing gradients."""
        tensors = {name: t.detach() for name, t in self.held.items()}
        for name, p in self.layers.named_parameters():
            tensors[name], tensors[f"{name}.grad"] = p.detach(), p.grad
        state = self.optimizer.state_dict()["state"]
        return tensors | {
            f"state {number} {name}": torch.as_tensor(t, dtype=torch.float64)
            for number, entries in state.items()
            if entries["step"] > 0
            for name, t in entries.items()
        }


NAMES = [
    name for name, value in vars(World).items() if callable(value) and name not in ("__init__", "params", "seen")
]
FREQUENT = ("backward", "step", "backward", "step", "zero_grad")


def run(seed, optimize):
    """Runs one sequence in both worlds and compares them after each operation."""
    choose = random.Random(seed)
    ours = World(optimize)
    theirs = World(lambda layers, params: torch.optim.Adam(params, foreach=False, **OPTIONS))
    done = []
    for _ in range(OPERATIONS):
        name, n = choose.choice([*NAMES, *FREQUENT, *FREQUENT]), choose.randrange(100)
        done.append((name, n))
        for world in (ours, theirs):
            getattr(world, name)(n)
        found, expected = ours.seen(), theirs.seen()
        for key in expected:
            mine, right = found[key], expected[key]
            assert (mine is None) == (right is None), (seed, done, key)
            if right is not None:
                # 25 operations of float64; errors of 1e-15 may grow through the gradients by some factor each.
                torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9, msg=f"{seed} {done} {key}")


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_sequences_in_one_process(implementation):
    for seed in range(SEQUENCES):
        run(seed, lambda layers, params: Adam(params, implementation=implementation, **OPTIONS))


@on_ranks(2)
@each_strategy
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_sequences_on_ranks(cluster, strategy, implementation):
    def optimize(layers, params):
        return distribute(Adam(params, implementation=implementation, **OPTIONS), layers, strategy=strategy)

    for seed in range(-(-SEQUENCES // 6)):  # operations take ten times as long as in one process
        run(1000 + seed, optimize)
