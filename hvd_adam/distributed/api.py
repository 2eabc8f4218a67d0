"""`distribute`: makes N ranks train as one. The default strategy wraps Adam in `hvd.DistributedOptimizer`.

optimizer = distribute(Adam(model.parameters(), lr=1e-3), model)
for images, labels in batches:
    optimizer.zero_grad()
    loss_function(model(images), labels).backward()   # reductions start while backward still runs
    optimizer.step()                                   # waits for them, then updates
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch

from hvd_adam.distributed.agreement import require_same
from hvd_adam.distributed.broadcast import require_same_layout
from hvd_adam.distributed.compression import COMPRESSIONS
from hvd_adam.distributed.context import horovod, init
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.distributed.zero import ShardedAdam
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam

STRATEGIES = {"allreduce": DistributedAdam, "sharded": ShardedAdam}
OPS = ("average", "adasum")


def distribute(
    optimizer: Adam,
    model: torch.nn.Module,
    *,
    strategy: str = "allreduce",
    accumulate: int = 1,
    compression: str = "none",
    op: str = "average",
    max_grad_norm: float | None = None,
    loss_scaler: Any | None = None,
    skip_nonfinite: bool = True,
) -> DistributedAdam:
    """Makes N ranks train as one: every rank calls it once with its own copy of the same model.

    Afterwards parameters, buffers, optimizer state and hyper-parameters are bit for bit rank 0's on every
    rank, and rank 0's are what they were. N ranks with batch b then make the update that one rank makes
    with batch N·b, up to float rounding. Use what is returned in place of `optimizer`.

    Args:
        optimizer: the `Adam` of this process, fresh or with state (on rank 0 alone is enough).
        model: the model whose parameters it updates, on its final device.
        strategy: "allreduce" (`hvd.DistributedOptimizer`: every rank keeps the whole optimizer state), or
            "sharded" (ZeRO stage 1: each rank keeps, and updates, one N-th). Every rank must then call
            `state_dict()`, which is whole and in the same format.
        accumulate: micro-batches to one update, ≥ 1. Call `step()` after each: it acts on every k-th, with
            the mean of the k gradients; `zero_grad()` in between keeps what has been accumulated.
        compression: what the gradients travel as: "none" (as they are), "fp16", "bf16".
        op: "average", or "adasum" (Maleki et al. 2020, arXiv 2006.02924), which combines the ranks' own Adam
            steps; it needs MPI and a power of two of ranks, and neither clips nor scales losses.
        max_grad_norm: clips the averaged, unscaled gradient to this global 2-norm, > 0.
        loss_scaler: a `torch.amp.GradScaler`. Call `loss_scaler.scale(loss).backward()` and `step()`, nothing
            else: unscaling, skipping and updating the scale happen inside, alike on all ranks.
        skip_nonfinite: leave an update out, on all ranks alike, if an element of the averaged gradient is infinite
            or NaN (`skipped_updates` counts): it would spoil weights and moments for ever. With a `loss_scaler` it
            is always left out; with adasum, which has no averaged gradient, never.

    Raises:
        UserError: an impossible option or combination; a model or options that differ from rank 0's; `init` not
            called.
        TypeError: the optimizer is not an `hvd_adam.Adam`.
    """
    if not isinstance(optimizer, Adam):
        raise TypeError(f"distribute takes an hvd_adam.Adam, not {type(optimizer).__name__}")
    if isinstance(optimizer, DistributedAdam):
        raise UserError("this optimizer is distributed already; call distribute once")
    hvd = horovod()
    if not hvd.is_initialized():
        raise UserError("call hvd_adam.init() before distribute()")
    _require_choice("strategy", strategy, STRATEGIES)
    _require_choice("compression", compression, COMPRESSIONS)
    _require_choice("op", op, OPS)
    if not isinstance(accumulate, Integral) or accumulate < 1:
        raise UserError(f"accumulate is {accumulate!r}; it must be a whole number ≥ 1")
    if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and max_grad_norm > 0):
        raise UserError(f"max_grad_norm is {max_grad_norm!r}; it must be a number > 0")
    if op == "adasum":
        if strategy == "sharded":
            raise UserError("adasum combines updates of whole tensors: use strategy=allreduce, or op=average")
        _require_adasum(compression, max_grad_norm, loss_scaler)
    _require_one_device(model, optimizer)
    options = {"accumulate": accumulate, "compression": compression, "op": op, "max_grad_norm": max_grad_norm}
    options["skip_nonfinite"] = bool(skip_nonfinite)
    require_same(
        init(), "options of distribute", {"strategy": strategy, "scaler": loss_scaler is not None, **options}
    )
    require_same_layout(model, optimizer)
    kind = STRATEGIES[strategy] if hvd.size() > 1 else DistributedAdam  # one rank's part is the whole
    return kind(optimizer, model, loss_scaler=loss_scaler, **options)


def _require_choice(what: str, value: object, choices: Iterable[str]) -> None:
    if value not in choices:
        raise UserError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _require_adasum(compression: str, max_grad_norm: float | None, loss_scaler: object) -> None:
    hvd = horovod()
    if max_grad_norm is not None or loss_scaler is not None:
        raise UserError("adasum combines the ranks' own steps: it cannot clip or unscale; use op=average")
    if compression == "bf16":
        raise UserError("adasum has no bf16 compression; use compression none or fp16")
    if hvd.size() > 1 and not hvd.mpi_enabled():
        raise UserError("adasum needs MPI; start the ranks with mpirun or horovodrun --mpi, or use op=average")
    if hvd.size() & (hvd.size() - 1):
        raise UserError(f"adasum needs a power of two of ranks, not {hvd.size()}; or use op=average")


def _require_one_device(model: torch.nn.Module, optimizer: Adam) -> None:
    parameters = [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise UserError(
            f"the parameters are on several devices ({', '.join(devices)}); move the model to one, "
            "model.to(cluster.device), before Adam is built"
        )
