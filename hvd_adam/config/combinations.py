"""Which options of a training run exclude each other. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hvd_adam.errors import UserError

TUNED = ("strategy", "compression", "bucket_mib", "threads")  # what `--tune` chooses


def require_combination(config: Any) -> None:
    """Refuses options that exclude each other.

    Args:
        config: a `TrainConfig`.

    Raises:
        UserError: an option cannot be honoured together with another one.
    """
    if config.batch_size is not None and config.global_batch_size is not None:
        raise UserError("--batch-size and --global-batch-size exclude each other: give one")
    if config.op == "adasum":
        _require_adasum(config)
    if config.state_format != "float32":
        option = f"--state-format {config.state_format}"
        if config.precision == "fp64":
            raise UserError(f"{option} is not for --precision fp64, whose state stays float64: leave it out")
        if config.amsgrad:
            raise UserError(
                f"{option} and --amsgrad exclude each other: the largest of many rounded moments grows with "
                "their rounding errors"
            )
    if config.compression in ("int8", "int4") and config.precision == "fp64":
        raise UserError(f"--compression {config.compression} is not for --precision fp64: use none")
    if config.strategy == "local":
        _require_local(config)
    if config.release_gradients:
        _require_releasable(config)
    if config.tune != "off":
        _require_tunable(config)


def _require_adasum(config: Any) -> None:
    """Refuses what Adasum, which combines the ranks' own steps, has not."""
    if config.noise_scale is not None:
        raise UserError("--op adasum averages no gradients, whose noise scale --noise-scale measures")
    if config.strategy != "allreduce":
        raise UserError("--op adasum combines updates of whole tensors: use --strategy allreduce")
    if config.max_grad_norm is not None or config.precision == "fp16":
        raise UserError("--op adasum combines the ranks' own steps: no --max-grad-norm, no --precision fp16")
    if config.compression in ("bf16", "int8", "int4"):
        raise UserError(f"--op adasum has no {config.compression} compression: use --compression none or fp16")


def _require_local(config: Any) -> None:
    """Refuses what needs ranks that average every update."""
    if config.compression not in ("none", "int8", "int4"):
        raise UserError(f"--strategy local has no {config.compression} compression: use none, int8 or int4")
    reasons = {
        "ema": (config.ema is not None, "each rank would average weights of its own"),
        "sync-batchnorm": (config.sync_batchnorm, "all ranks would wait for each other in every update"),
        "check-consistency-every": (config.check_consistency_every is not None, "the ranks differ by design"),
        "noise-scale": (config.noise_scale is not None, "no gradients are averaged"),
    }
    for name, (given, reason) in reasons.items():
        if given:
            raise UserError(f"--{name} cannot be used with --strategy local: {reason}; leave it out")
    if config.elastic and config.islands is not None:
        raise UserError(
            "--islands cannot be used with --elastic, which gives the ranks to islands of one: leave it out"
        )


def _require_releasable(config: Any) -> None:
    """Refuses what needs the whole gradient, several passes, or an update that can be taken back."""
    compression, unscaled = config.compression in ("none", "fp16", "bf16"), config.precision != "fp16"
    reasons = {
        "strategy": (config.strategy == "allreduce", "use --strategy allreduce"),
        "op": (config.op == "average", "use --op average"),
        "accumulate": (config.accumulate == 1, "an update has one backward pass: leave it out"),
        "max_grad_norm": (config.max_grad_norm is None, "the whole gradient is never there: leave it out"),
        "noise_scale": (config.noise_scale is None, "the whole gradient is never there: leave it out"),
        "precision": (unscaled, "updates that overflow cannot be skipped: use bf16"),
        "compression": (compression, "no residuals are kept: use none, fp16 or bf16"),
        "compile": (not config.compile, "a compiled backward returns all gradients at once: leave it out"),
        "device": (config.device != "cuda", "it is for CPUs so far"),
        "elastic": (
            not config.elastic,
            "not tested with lost ranks so far: leave it out",
        ),
        "tune": (config.tune == "off", "nothing is left to choose: leave out one of them"),
    }
    for name, (allowed, reason) in reasons.items():
        if not allowed:
            value, dashed = getattr(config, name), name.replace("_", "-")
            given = f"--{dashed}" if value is True else f"--{dashed} {value}"
            raise UserError(f"{given} cannot be used with --release-gradients: {reason}")


def _require_tunable(config: Any) -> None:
    """Refuses options that `--tune` chooses, and runs in which there is no choice."""
    tuned = [item for item in fields(config) if item.name in TUNED]
    given = [item.name for item in tuned if getattr(config, item.name) != item.default]
    if given:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"--tune {config.tune} chooses {named}: give only one of them")
    if config.op == "adasum":
        raise UserError(f"--op adasum leaves --tune {config.tune} no choice: leave one out")
    if config.elastic:
        raise UserError(
            f"--tune {config.tune} measures one number of ranks, which --elastic changes: use --compression auto"
        )
