"""Small model, batches, training loop and comparisons for tests of `distribute` on real ranks."""

import hashlib

import horovod.torch as hvd
import torch
import torch.nn.functional as F


def small_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)


def batches(count, samples, dtype=torch.float64):
    """Yields the same global batches on every rank."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield (
            torch.randn(samples, 6, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(samples, 3, generator=generator, dtype=torch.float64).to(dtype),
        )


def share(batch, cluster, micro_batches=1):
    """Returns this rank's micro-batches of a global batch."""
    parts = zip(*(tensor.chunk(cluster.size * micro_batches) for tensor in batch), strict=True)
    return list(parts)[cluster.rank * micro_batches :][:micro_batches]


def train(model, optimizer, cluster, steps=5, micro_batches=1, scaler=None):
    """Trains as a user's loop does, on this rank's share of 16 samples per update."""
    for batch in batches(steps, 16, next(model.parameters()).dtype):
        for inputs, targets in share(batch, cluster, micro_batches):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs), targets)
            (scaler.scale(loss) if scaler else loss).backward()
            optimizer.step()


def train_alone(model, steps=5, clip=None, **adam):
    """Trains the oracle: one process, whole batches, PyTorch's own Adam."""
    optimizer = torch.optim.Adam(model.parameters(), foreach=False, **adam)
    for inputs, targets in batches(steps, 16, next(model.parameters()).dtype):
        optimizer.zero_grad()
        F.mse_loss(model(inputs), targets).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def largest_difference(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def digest(*objects):
    """Returns a hash of all tensors and plain values in nested containers."""
    sha = hashlib.sha256()

    def visit(value):
        if isinstance(value, torch.Tensor):
            visit([str(value.dtype), tuple(value.shape)])
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            visit(list(value.items()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            sha.update(repr(value).encode())

    visit(objects)
    return sha.hexdigest()


def whole_state(optimizer, parameter):
    """Returns the whole state of one parameter, also where it is sharded; every rank must call it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    (number,) = [i for i, p in enumerate(parameters) if p is parameter]
    return optimizer.state_dict()["state"][number]


def everything(model, optimizer):
    """Returns a hash of parameters, buffers, hyper-parameters and the whole state; every rank must call it."""
    return digest(model.state_dict(), optimizer.state_dict())


def same_everywhere(value):
    return len(set(hvd.allgather_object(value))) == 1
