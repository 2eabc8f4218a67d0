"""Residuals of gradients that are sent as codes (`compression="int8"` and `"int4"`), in checkpoints."""

from __future__ import annotations

from typing import Any

from hvd_adam.distributed.averaged_adam import AveragedAdam
from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.context import horovod
from hvd_adam.log import logger


def restore_residuals(optimizer: AveragedAdam, saved: dict[str, Any] | None, where: str) -> None:
    """Gives an optimizer the residuals of a checkpoint, or 0 if it has none. Every rank must call it.

    Args:
        optimizer: the distributed optimizer.
        saved: on rank 0, `ErrorFeedback.state_dict_on_root` or `total_state_dict`, or None; ignored on others.
        where: the checkpoint, for messages.

    Raises:
        UserError: on every rank: they do not fit.
    """
    if optimizer.error_feedback is not None:
        optimizer.error_feedback.load_state_dict(saved)
    elif saved is not None and (saved.get("buckets") or saved.get("parked")) and horovod().rank() == ROOT:
        logger.warning(
            f"checkpoint {where} has residuals of compression {saved.get('compression')}, which this compression "
            "does not use: gradients that were not yet sent are dropped"
        )
