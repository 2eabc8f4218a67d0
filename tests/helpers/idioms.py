"""`Setup`: what a training loop takes from its surroundings; the same code runs in one process and on ranks.

A loop is a function that takes a `Setup` and returns the tensors to compare. In one process it trains on the whole
batch with `torch.optim.Adam`. On N ranks each rank trains on its rows of the same batch with `distribute`. All
losses are means over rows, and every rank has equally many rows, so that the mean over the ranks of a gradient is
the gradient of the whole batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import horovod.torch as hvd
import torch

from hvd_adam import Adam, distribute


@dataclass(frozen=True)
class Setup:
    """The ranks and the strategy that a loop runs with.

    Attributes:
        rank: index of this process; it takes every `size`-th row of a batch, from row `rank` on.
        size: number of ranks that share a batch.
        strategy: of `distribute`; None for the reference, one process with PyTorch's own Adam.
    """

    rank: int = 0
    size: int = 1
    strategy: str | None = None

    def adam(self, params, **options):
        """Returns an optimizer that is not distributed yet.

        Its ε is large. With a small one Adam's update would be the same for all multiples of a gradient, and a sum
        in place of a mean would stay undetected.
        """
        options = {"lr": 1e-2, "eps": 1e-2, **options}
        if self.strategy:
            return Adam(params, **options)
        kind = torch.optim.AdamW if options.pop("decoupled_weight_decay", False) else torch.optim.Adam
        return kind(params, foreach=False, **options)

    def wrap(self, optimizer, model, **options):
        """Distributes the optimizer; in one process returns it as it is."""
        return distribute(optimizer, model, strategy=self.strategy, **options) if self.strategy else optimizer

    def optimizer(self, model, **options):
        """Returns an optimizer of all parameters of a model, distributed without options."""
        return self.wrap(self.adam(model.parameters(), **options), model)

    def shard(self, batch):
        """Returns this rank's rows of a batch."""
        return batch[self.rank :: self.size]

    def micro_batches(self, count, *batch):
        """Returns this rank's rows as `count` micro-batches; in one process the whole batch as one."""
        count = count if self.strategy else 1
        parts = zip(*(tensor.chunk(count) for tensor in batch), strict=True)
        return [[self.shard(tensor) for tensor in part] for part in parts]

    def mean(self, value):
        """Returns the mean over the ranks of a tensor or a number."""
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        return hvd.allreduce(value, op=hvd.Average) if self.strategy else value

    def clip_grad_norm_(self, optimizer, model, max_norm):
        """Clips with the optimizer's method, which PyTorch's optimizers do not have. Returns the norm."""
        if self.strategy:
            return optimizer.clip_grad_norm_(max_norm)
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def scaled_step(self, scaler, *optimizers):
        """Steps the optimizers that share the option `loss_scaler`; in one process with the scaler's own calls."""
        for optimizer in optimizers:
            if self.strategy:
                optimizer.step()
            else:
                scaler.step(optimizer)
        if not self.strategy:
            scaler.update()


def global_batches(steps=6, rows=12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields inputs and targets of whole batches, the same on all ranks; 1, 2 and 3 ranks divide the rows."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        inputs = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
        yield inputs, torch.randn(rows, 3, generator=generator, dtype=torch.float64)


def batches(world: Setup, steps=6, rows=12) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields this rank's rows of the global batches."""
    for inputs, targets in global_batches(steps, rows):
        yield world.shard(inputs), world.shard(targets)


def mlp(inputs=6, hidden=8, outputs=3):
    """Returns a small model in float64; the layers 0 and 2 have parameters."""
    layers = torch.nn.Linear(inputs, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs)
    return torch.nn.Sequential(*layers).double()


def result(*models, also=()):
    """Returns what to compare: parameters and buffers of the models, and what a loop has recorded."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return [torch.as_tensor(value, dtype=torch.float64).detach().clone() for value in (*tensors, *also)]


def run(loop, world: Setup):
    """Runs a loop from a fixed seed and returns what it returns."""
    torch.manual_seed(0)
    return loop(world)


def largest_difference(found, expected):
    """Returns the largest absolute difference of two results; infinite where only one is not a number."""
    pairs = list(zip(found, expected, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    differences = torch.cat([(a - b).abs().reshape(-1) for a, b in pairs])
    return differences.nan_to_num(nan=float("inf")).max().item()
