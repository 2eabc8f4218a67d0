"""`distribute`: data-parallel training of a model with `Adam`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, overload

import torch

from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.automatic.candidates import AUTOMATIC
from hvd_adam.distributed.broadcast.training import require_same_layout
from hvd_adam.distributed.context import current_cluster, horovod
from hvd_adam.distributed.gradients.bucket_layout import BUCKET_MIB
from hvd_adam.distributed.gradients.compression import COMPRESSIONS
from hvd_adam.distributed.local.islands import count_islands
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.distributed.local.options import LOCAL, require_local_model, require_options
from hvd_adam.distributed.model_checks import (
    parameter_names,
    require_copyable,
    require_one_device,
    require_parameters_of,
    require_positive,
    require_unchanged_by_forward,
    require_whole,
)
from hvd_adam.distributed.noise.meter import FORMS, GRADIENT
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.distributed.release.optimizer import ReleasingAdam
from hvd_adam.distributed.release.options import require_releasable
from hvd_adam.distributed.wire.codable import require_codable
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam

STRATEGIES = ("allreduce", "sharded")  # those that average the gradients of every update
OPS = ("average", "adasum")


@overload
def distribute(
    optimizer: Adam, model: torch.nn.Module, *, strategy: Literal["local"], **options: Any
) -> LocalAdam: ...


@overload
def distribute(
    optimizer: Adam, model: torch.nn.Module, *, strategy: str = "allreduce", **options: Any
) -> DistributedAdam: ...


# The caller may be in that mode, or in no_grad(); hooks need a graph.
@torch.inference_mode(False)  # type: ignore[misc]  # its options are written once, here
@torch.enable_grad()
def distribute(
    optimizer: Adam,
    model: torch.nn.Module,
    *,
    strategy: str = "allreduce",
    accumulate: int = 1,
    compression: str = "none",
    bucket_mib: float = BUCKET_MIB,
    op: str = "average",
    max_grad_norm: float | None = None,
    loss_scaler: Any | None = None,
    skip_nonfinite: bool = True,
    defer_averaging: bool = False,
    noise_scale: int | None = None,
    noise_scale_form: str = GRADIENT,
    release_gradients: bool = False,
    local_steps: int = 50,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    islands: str | int | None = None,
) -> DistributedAdam | LocalAdam:
    """Distributes an optimizer: when `backward` returns, gradients are the mean over all ranks.

    Every rank calls it, after `init`, with its own copy of the same model. It copies rank 0's parameters,
    buffers, optimizer state and hyper-parameters to all ranks, bit for bit; rank 0's are not changed. From then on
    N ranks with batch size b make the update that one rank makes with batch size N·b, up to floating-point
    rounding. A second call for the same parameters, such as after unfreezing some, retires the first optimizer.

    Args:
        optimizer: the `Adam` of this process, new or with state; state is needed on rank 0 only.
        model: the model that contains its parameters, on its final device.
        strategy: "allreduce": every rank keeps the whole optimizer state. "sharded": each rank keeps and updates
            one N-th of it (ZeRO stage 1); `state_dict` gathers it, so every rank must call it. "local": each rank
            makes `local_steps` updates by itself, then all average their progress (DiLoCo; see `LocalAdam`).
        accumulate: micro-batches per update, at least 1. Call `step` after each micro-batch: every
            `accumulate`-th call updates, with the mean over the micro-batches. `zero_grad` keeps the gradients of
            an update that is not complete.
        compression: format in which gradients are sent: "none" (their own), "fp16", "bf16", or codes of 8 or 4
            bits with error feedback, "int8" or "int4". "auto:any": the fastest of them but "fp16", measured in the
            first updates. "auto", or "auto:lossless": only those that do not round gradients; what others would
            gain is logged.
        bucket_mib: gradients are reduced in fixed buckets of at most so many MiB, greater than 0, so that sums do
            not depend on timing. A larger parameter has a bucket to itself. Large buckets use more of the
            network's bandwidth; with small ones the first reductions start earlier. "local" has no buckets.
        op: "average", or "adasum" (Maleki et al. 2020, arXiv 2006.02924), which combines the updates of the ranks
            instead of averaging their gradients. Adasum needs MPI and a number of ranks that is a power of two,
            and cannot clip gradients or scale losses.
        max_grad_norm: clip the averaged, unscaled gradient to this global 2-norm, greater than 0. None: do not
            clip.
        loss_scaler: a `torch.amp.GradScaler`. Call only `loss_scaler.scale(loss).backward()` and `step`, which
            unscales, skips updates and updates the loss scale, identically on all ranks. Optimizers may share one:
            the scale is then updated once all of them have stepped. None: the scaler's own `unscale_`, `step` and
            `update` work as in one process.
        skip_nonfinite: skip an update, on all ranks, if an element of the averaged gradient is infinite or NaN;
            otherwise it would make weights and moments NaN for good. `skipped_updates` counts them. With a
            `loss_scaler` such updates are always skipped, with Adasum never.
        defer_averaging: `step` waits for the reductions, not `backward`. Gradients must then not be used between
            the two. A loop that needs only `backward` and `step` saves the wait between them; on CPUs, without
            `max_grad_norm` and `loss_scaler`, buckets are updated while others are being reduced.
        noise_scale: measure the gradient noise scale in every `noise_scale`-th update, at least 1; read it with
            `optimizer.noise.estimate()`. It needs several ranks or micro-batches, and no Adasum. None: do not.
        noise_scale_form: "gradient": of the gradients; "adam": of the gradients divided by Adam's √v̂ + ε.
        release_gradients: update each bucket during `backward`, as soon as its gradients are averaged, and give
            their memory back (see `ReleasingAdam`): at most two buckets have buffers, instead of all gradients.
            Every `p.grad` is None after `step`. It needs parameters on CPUs, `skip_nonfinite=False`, and one
            backward pass per update; it cannot clip gradients or scale losses.
        local_steps: with "local", updates of each rank between two meetings, at least 1.
        outer_lr: with "local", learning rate of the outer SGD, greater than 0.
        outer_momentum: with "local", its Nesterov momentum, in [0, 1).
        islands: with "local", which ranks average the gradients of every update among themselves: "host", those of
            each host; or the number of islands, of consecutive ranks, which divides the number of ranks. Where an
            island has several ranks, start Horovod with `init(process_sets=True)`. None: every rank is an island.

    Returns:
        The optimizer to use in place of `optimizer`. See `DistributedAdam` for what `p.grad` holds when, and for
        the calls that every rank must make; with "local", `LocalAdam`.

    Raises:
        UserError: an invalid option or combination of options; a model or options that differ from rank 0's, on
            every rank; `init` has not been called; the parameters are on several devices, or the model does not
            have one of them.
        TypeError: the optimizer is not an `hvd_adam.Adam`.

    Example:
        >>> optimizer = distribute(Adam(model.parameters(), lr=1e-3), model)
        >>> for images, labels in batches:
        ...     optimizer.zero_grad()
        ...     loss_function(model(images), labels).backward()  # then p.grad is the mean over all ranks
        ...     optimizer.step()
    """
    if isinstance(optimizer, torch.nn.Module) and isinstance(model, torch.optim.Optimizer):
        raise TypeError("distribute() takes the optimizer first: distribute(optimizer, model)")
    if not isinstance(optimizer, Adam):
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        raise TypeError(
            f"distribute() takes an hvd_adam.Adam, not a {kind}: `from hvd_adam import Adam` has the arguments of "
            "torch.optim.Adam"
        )
    if isinstance(optimizer, DistributedAdam | LocalAdam):
        raise UserError("this optimizer is distributed already; call distribute once")
    if optimizer.state_is_sharded:
        raise UserError(
            "the state of this Adam is sharded by an earlier distribute(): save state_dict() of the optimizer "
            "that it returned, and load it into a new Adam"
        )
    hvd = horovod()
    if not hvd.is_initialized():
        raise UserError("call hvd_adam.init() before distribute()")
    _require_choice("strategy", strategy, (*STRATEGIES, LOCAL))
    _require_choice("compression", compression, (*COMPRESSIONS, *AUTOMATIC))
    _require_choice("op", op, OPS)
    require_whole("accumulate", accumulate)
    require_positive("bucket_mib", bucket_mib)
    for without, given in (("strategy='local'", strategy == LOCAL), ("op='adasum'", op == "adasum")):
        if given and bucket_mib != BUCKET_MIB:
            raise UserError(f"bucket_mib={bucket_mib!r} has no effect with {without}, which has no buckets")
    if max_grad_norm is not None:
        require_positive("max_grad_norm", max_grad_norm, finite=False)  # infinite: only measures it
    _require_choice("noise_scale_form", noise_scale_form, FORMS)
    if noise_scale is not None:
        _require_noise(noise_scale, accumulate, op)
    elif noise_scale_form != GRADIENT:
        raise UserError(f"noise_scale_form={noise_scale_form!r} has no effect without noise_scale")
    if op == "adasum":
        if strategy != "allreduce":
            raise UserError("adasum combines updates of whole tensors: use strategy=allreduce, or op=average")
        _require_adasum(compression, max_grad_norm, loss_scaler)
    if loss_scaler is not None and not hasattr(loss_scaler, "is_enabled"):
        raise UserError(f"loss_scaler is {loss_scaler!r}; it must be a torch.amp.GradScaler, or None")
    local: dict[str, Any] = {"local_steps": local_steps, "outer_lr": outer_lr, "outer_momentum": outer_momentum}
    local["islands"] = islands
    require_options(strategy, local, compression, defers=defer_averaging, noise=noise_scale is not None)
    with raise_on_all_ranks(current_cluster()):
        if strategy == LOCAL:
            require_local_model(optimizer, model)
            count_islands(islands, current_cluster())
        _require_supported(model, optimizer, compression)
    options: dict[str, Any] = {
        "accumulate": accumulate,
        "compression": compression,
        "op": op,
        "max_grad_norm": max_grad_norm,
    }
    options |= {"bucket_mib": float(bucket_mib), "noise_scale": noise_scale}
    options |= {"noise_scale_form": noise_scale_form}
    options |= {"skip_nonfinite": bool(skip_nonfinite), "defer_averaging": bool(defer_averaging)}
    if release_gradients:
        require_releasable(optimizer, {**options, "strategy": strategy, "loss_scaler": loss_scaler})
    compared = {"strategy": strategy, "scaler": loss_scaler is not None, **options, **local}
    compared["release_gradients"] = bool(release_gradients)
    require_same(current_cluster(), "options of distribute", compared)
    require_same_layout(model, optimizer)
    if strategy == LOCAL:
        options = {key: options[key] for key in ("accumulate", "compression", "max_grad_norm", "skip_nonfinite")}
        return LocalAdam(optimizer, model, loss_scaler=loss_scaler, **options, **local)
    kind = ReleasingAdam if release_gradients else DistributedAdam
    return kind(optimizer, model, strategy=strategy, loss_scaler=loss_scaler, **options)


def _require_supported(model: torch.nn.Module, optimizer: Adam, compression: str) -> None:
    require_parameters_of(model, optimizer.param_groups)
    require_one_device(model)
    if compression in CODECS:
        names = parameter_names(model, optimizer.param_groups)
        require_codable((p for p in names if p.requires_grad), names, compression)
    if horovod().size() > 1:
        require_copyable(model)
        require_unchanged_by_forward(model, (p for group in optimizer.param_groups for p in group["params"]))


def _require_choice(what: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"{what} is {value!r}; use one of {', '.join(choices)}")


def _require_noise(noise_scale: int, accumulate: int, op: str) -> None:
    require_whole("noise_scale", noise_scale, ", or None")
    if op == "adasum":
        raise UserError("noise_scale compares gradients with their mean, which adasum has not: use op=average")
    if horovod().size() * accumulate == 1:
        raise UserError("noise_scale on one rank compares micro-batches: use accumulate ≥ 2, or more ranks")


def _require_adasum(compression: str, max_grad_norm: float | None, loss_scaler: object) -> None:
    hvd = horovod()
    if max_grad_norm is not None or loss_scaler is not None:
        raise UserError("adasum combines the ranks' own steps: it cannot clip or unscale; use op=average")
    if compression not in ("none", "fp16", *AUTOMATIC):
        raise UserError(f"adasum has no {compression} compression; use compression none or fp16")
    if hvd.size() > 1 and not hvd.mpi_enabled():
        raise UserError("adasum needs MPI; start the ranks with mpirun or horovodrun --mpi, or use op=average")
    if hvd.size() & (hvd.size() - 1):
        raise UserError(f"adasum needs a power of two of ranks, not {hvd.size()}; or use op=average")
