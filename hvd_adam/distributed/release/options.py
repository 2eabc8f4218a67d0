"""What `distribute(…, release_gradients=True)` refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam

OPTION = "release_gradients=True"


def require_releasable(optimizer: Adam, options: Mapping[str, Any]) -> None:
    """Checks that gradients can be used and given back bucket by bucket.

    Args:
        optimizer: the optimizer that is given to `distribute`.
        options: of `distribute`, by name.

    Raises:
        UserError: an option, or the optimizer, needs the whole gradient, or several passes; names the first.
    """
    reasons = {
        "strategy": (options["strategy"] != "allreduce", "needs strategy='allreduce'"),
        "op": (options["op"] != "average", "updates by averaged gradients: use op='average'"),
        "accumulate": (options["accumulate"] > 1, "has one backward pass per update: use accumulate=1"),
        "max_grad_norm": (options["max_grad_norm"] is not None, "never has the whole gradient, whose norm clips"),
        "loss_scaler": (
            options["loss_scaler"] is not None,
            "cannot skip updates that overflow: use bfloat16, which needs no loss scaler",
        ),
        "noise_scale": (
            options["noise_scale"] is not None,
            "never has the whole gradient, whose norm it measures",
        ),
        "compression": (
            options["compression"] not in ("none", "fp16", "bf16"),
            "keeps no residuals of gradients: use compression none, fp16 or bf16",
        ),
        "defer_averaging": (bool(options["defer_averaging"]), "averages during backward(): leave it out"),
        "skip_nonfinite": (
            bool(options["skip_nonfinite"]),
            "cannot take back updates of other buckets: use skip_nonfinite=False; a gradient that is not finite "
            "then ends the job",
        ),
    }
    for name, (refused, reason) in reasons.items():
        if refused:
            raise UserError(f"{name}={options[name]!r} cannot be used with {OPTION}, which {reason}")
    if not optimizer.steps_plainly:
        raise UserError(
            f"the step() of {type(optimizer).__qualname__} would find no gradients with {OPTION}: use Adam "
            "itself, or leave the option out"
        )
    if vars(optimizer).get("_optimizer_step_pre_hooks"):
        raise UserError(f"hooks before step() would find no gradients with {OPTION}: remove them, or the option")
    devices = {p.device.type for group in optimizer.param_groups for p in group["params"]} - {"cpu"}
    if devices:
        raise UserError(f"{OPTION} is for parameters on CPUs so far, not on {', '.join(sorted(devices))}")
