"""A rank of `bench wire`: training steps with compressed gradients, what they send, and what they miss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvd_adam.bench import step_worker
from hvd_adam.bench.config import DEFERRED, OURS
from hvd_adam.bench.interleave import Measure, Times
from hvd_adam.bench.step_worker import (
    LEARNING_RATE,
    Wrapped,
    build_model,
    random_batch,
    start_process_group,
    training_step,
)
from hvd_adam.bench.timer import WARM_UP_CALLS, synchronizer, time_calls
from hvd_adam.bench.wire_bytes import POWERSGD_RANK
from hvd_adam.distributed.automatic.candidates import ANY
from hvd_adam.distributed.gradients.compression import COMPRESSIONS
from hvd_adam.distributed.launch_env import LaunchInfo

# Steps before PowerSGD compresses: DDP changes its buckets after the first.
POWERSGD_START = 2

# With several buckets, PowerSGD's later reductions start from callbacks, in an order that differs between ranks,
# and Gloo fails.
ONE_BUCKET_MB = 1 << 14

# Of a TCP packet: Ethernet 14, IPv4 20, TCP 20 with 12 for time stamps. Acknowledgements have nothing else.
HEADER_BYTES = 66


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Sets this rank up for the task's variant, and returns a function that measures one turn.

    A turn returns the seconds of each step as "step", the bytes at the network interface and those without headers
    per step as "interface" and "payload" if the task has an interface, and the relative error as "gradient_error",
    unless averaging is deferred.
    Where the compression is chosen by measurements, they have ended, and instead of the error it returns the index
    of the chosen one in `COMPRESSIONS` as "choice".

    Args:
        task: "variant", "model", "batch_size", "device" ("cpu" or "cuda"), "steps" per turn and "interface" (a
            name, or None).
        launch: launcher, rank and size of this process.
        folder: directory shared by the ranks.
    """
    variant, name, size = task["variant"], task["model"], task["batch_size"]
    wrap = connect(variant, task["device"], launch, folder)
    device = torch.device("cpu") if task["device"] == "cpu" else torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    module = build_model(name).to(device)
    model, optimizer = wrap(module)
    own = random_batch(size, launch.rank, device)
    step = training_step(model, optimizer, *own)
    for _ in range(POWERSGD_START if variant == "ddp-powersgd" else 0):
        step()
    has_mean = ANY not in variant and not variant.endswith(DEFERRED)
    known = error_of_one_step(name, module, model, optimizer, launch, size) if has_mean else {}
    choice = getattr(getattr(optimizer, "error_feedback", None), "choice", None)
    while choice is not None and choice.is_measuring:
        step()
    synchronize, steps, interface = synchronizer(task["device"]), task["steps"], task["interface"]

    def measure() -> Times:
        before = sent(interface)
        times = time_calls(step, steps, synchronize)
        calls = WARM_UP_CALLS + steps
        counts = {key: [(after - before[key]) / calls] for key, after in sent(interface).items()}
        chosen = {} if choice is None else {"choice": [float(COMPRESSIONS.index(optimizer.compression))]}
        return {"step": times, **known, **chosen, **counts}

    return measure


def error_of_one_step(
    name: str, module: nn.Module, model: nn.Module, optimizer: Any, launch: LaunchInfo, size: int
) -> Times:
    """Makes a step, and returns the relative error of its averaged gradient as "gradient_error".

    Args:
        name: of the model.
        module: the model.
        model: the distributed one.
        optimizer: of it.
        launch: of this process.
        size: images per rank.
    """
    device = next(module.parameters()).device
    batches = [random_batch(size, rank, device) for rank in range(launch.size)]
    copy = build_model(name).to(device)
    copy.load_state_dict(module.state_dict())
    error = relative_error(averaged(model, optimizer, batches[launch.rank]), exact_mean(copy, batches))
    optimizer.step()
    return {"gradient_error": [error]}


def sent(interface: str | None) -> dict[str, int]:
    """Returns the bytes that this host has sent, with and without headers; empty without an interface.

    The kernel counts a packet that it leaves to the device to divide once, with one header.
    """
    if interface is None:
        return {}
    counters = psutil.net_io_counters(pernic=True)[interface]
    payload = counters.bytes_sent - HEADER_BYTES * counters.packets_sent
    return {"interface": counters.bytes_sent, "payload": payload}


def connect(variant: str, device: str, launch: LaunchInfo, folder: Path) -> Callable[[nn.Module], Wrapped]:
    """Connects this rank with the others.

    Returns a function from a model to the distributed model and its optimizer.
    """
    if variant.startswith(OURS):
        return step_worker.connect(variant, device, launch, folder)
    if device == "cuda":
        torch.cuda.set_device(launch.rank)
    start_process_group(device, launch, folder)

    def wrap(module: nn.Module) -> Wrapped:
        bucket_mb = ONE_BUCKET_MB if variant == "ddp-powersgd" else None
        model = nn.parallel.DistributedDataParallel(module, bucket_cap_mb=bucket_mb)
        _add_hook(model, variant)
        return model, torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)

    return wrap


def _add_hook(model: nn.parallel.DistributedDataParallel, variant: str) -> None:
    # Here: a torch without distributed has none.
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if variant == "ddp-powersgd":
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif variant != "ddp":
        hooks = {"ddp-fp16": default_hooks.fp16_compress_hook, "ddp-bf16": default_hooks.bf16_compress_hook}
        model.register_comm_hook(None, hooks[variant])


def averaged(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Returns the gradients of the model after a backward pass on this rank's batch, averaged over the ranks."""
    images, labels = batch
    optimizer.zero_grad()
    loss: Any = F.cross_entropy(model(images), labels)
    loss.backward()
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        optimizer.synchronize()  # "sharded" may have its own part only until then
    return [p.grad for p in model.parameters() if p.grad is not None]


def exact_mean(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Returns the mean of the gradients on the batches of all ranks, added in float64."""
    totals = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for images, labels in batches:
        model.zero_grad()
        loss: Any = F.cross_entropy(model(images), labels)
        loss.backward()
        for total, p in zip(totals, model.parameters(), strict=True):
            if p.grad is not None:
                total += p.grad
    return [total / len(batches) for total in totals]


def relative_error(gradients: list[Tensor], exact: list[Tensor]) -> float:
    """Returns the 2-norm of the difference over that of the exact gradients, in float64."""
    difference = [g.double() - right for g, right in zip(gradients, exact, strict=True)]
    missed, whole = (float(torch.stack([t.norm() for t in tensors]).norm()) for tensors in (difference, exact))
    return missed / whole
