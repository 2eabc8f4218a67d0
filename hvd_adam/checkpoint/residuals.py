"""What ranks have not sent yet, in checkpoints: residuals of codes, and progress of islands."""

from __future__ import annotations

from typing import Any

from hvd_adam.distributed.averaged_adam import AveragedAdam
from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.log import logger


def restore_unsent(
    optimizer: AveragedAdam | LocalAdam,
    residuals: dict[str, Any] | None,
    islands: dict[str, Any] | None,
    where: str,
) -> None:
    """Gives an optimizer the residuals and the islands of a checkpoint. Every rank must call it.

    Args:
        optimizer: the distributed optimizer.
        residuals: as for `restore_residuals`.
        islands: on rank 0, `LocalAdam.islands_on_root`, or None; ignored on others.
        where: the checkpoint, for messages.

    Raises:
        UserError: on every rank: they do not fit.
    """
    if isinstance(optimizer, LocalAdam):
        optimizer.load_islands(islands)
        return
    restore_residuals(optimizer, residuals, where)
    if islands is not None and islands["updates_in_round"] and horovod().rank() == ROOT:
        dropped = islands["updates_in_round"]
        logger.warning(
            f"checkpoint {where} was written within a round of --strategy local: {dropped} local updates "
            "since the last meeting are dropped"
        )


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
