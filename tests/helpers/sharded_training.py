"""Parameters, gradients, updates and comparisons for tests of the sharded strategy.

Gradients are multiples of 1/8 with absolute value up to 1. Their sums over ranks and micro-batches are exact in
every dtype and order, so that only the update itself is rounded.
"""

import math

import horovod.torch as hvd
import torch

from helpers.exchanges import scattering
from hvd_adam import Adam, distribute

ODD_SHAPES = ((7, 13), (1,), (), (0,), (101,), (2,), (3, 1, 5))
ADAM_OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def parameter_list(shapes=ODD_SHAPES, dtype=torch.float64):
    """Returns a model that consists of parameters, identical on all ranks; several dtypes alternate."""
    generator = torch.Generator().manual_seed(0)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    return torch.nn.ParameterList(
        torch.nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtypes[i % len(dtypes)])
        )
        for i, shape in enumerate(shapes)
    )


def gradients_of(model, step, part):
    """Returns the gradients of one rank or micro-batch, `part`, in a step; every rank can compute all of them."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    return [torch.randint(-8, 9, p.shape, generator=generator).double() / 8 for p in model.parameters()]


def step_on_ranks(model, optimizer, cluster, first, last, micro_batches=1, absent=(), scaler=None):
    """Makes steps [first, last) with this rank's gradients, and none for parameters in `absent`."""
    for step in range(first, last):
        for micro_batch in range(micro_batches):
            optimizer.zero_grad()
            mine = gradients_of(model, step, cluster.rank * micro_batches + micro_batch)
            pairs = list(zip(model.parameters(), mine, strict=True))
            used = [(p, g) for i, (p, g) in enumerate(pairs) if i not in absent]
            if used:
                loss = sum((p * g.to(p.dtype)).sum().double() for p, g in used)
                (scaler.scale(loss) if scaler else loss).backward()
            optimizer.step()


def step_in_one_process(model, optimizer, parts, first, last, clip=None, absent=()):
    """Makes the steps of `step_on_ranks` in one process, with the mean of all gradients. Returns the last norm."""
    for step in range(first, last):
        means = [sum(g) / parts for g in zip(*(gradients_of(model, step, i) for i in range(parts)), strict=True)]
        for i, (p, g) in enumerate(zip(model.parameters(), means, strict=True)):
            p.grad = None if i in absent else g.to(p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
    return norm.item()


def sharded_adam(model, *, adam=None, **options):
    """Returns a new sharded optimizer of the model."""
    return distribute(Adam(model.parameters(), **(adam or ADAM_OPTIONS)), model, strategy="sharded", **options)


def torch_adam(model, **options):
    return torch.optim.Adam(model.parameters(), foreach=False, **(options or ADAM_OPTIONS))


def each_exchange():
    """Yields once with the exchange that CPUs use and, under MPI, once with that of GPUs.

    With Gloo, a large broadcast after a reduce-scatter of Horovod 0.28.1 hangs.
    """
    yield "in place"
    if hvd.mpi_enabled():
        with scattering():
            yield "scattering"


def assert_close(model, other, tolerance=1e-12):
    """Compares parameters: 20 steps in float64, some 30 roundings each, of numbers of size 1 differ by < 1e-12."""
    for i, (p, q) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        torch.testing.assert_close(
            p.detach(), q.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


def assert_same_state(state, other, tolerance=1e-12):
    """Compares state dictionaries by keys, shapes, dtypes and, up to rounding, values."""
    assert state.keys() == other.keys()
    for i in state:
        assert state[i].keys() == other[i].keys(), i
        for key in state[i]:
            torch.testing.assert_close(state[i][key], other[i][key], rtol=tolerance, atol=tolerance)


def trained_in_one_process(steps, parts, **options):
    """Returns a model and PyTorch's Adam after this many steps, as a checkpoint would contain them."""
    model = parameter_list()
    optimizer = torch_adam(model, **ADAM_OPTIONS, **options)
    step_in_one_process(model, optimizer, parts, 0, steps)
    return model, optimizer
