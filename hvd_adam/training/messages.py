"""Lines that a run prints: its first line, where it resumes, how it ends."""

from __future__ import annotations

from pathlib import Path

from hvd_adam._version import __version__
from hvd_adam.config import TrainConfig
from hvd_adam.data.images import ImageData
from hvd_adam.distributed.context import Cluster
from hvd_adam.training.run import BatchSizes


def first_line(config: TrainConfig, data: ImageData, cluster: Cluster, sizes: BatchSizes) -> str:
    """Returns what is trained on what, and how it is divided into updates."""
    return (
        f"hvd_adam {__version__}: {config.model} on {config.dataset} ({data.summary()}), {cluster.size} rank(s) "
        f"on {cluster.device.type}, {sizes.global_batch} images per update, {sizes.total_steps} updates"
    )


def stopped(config: TrainConfig, folder: Path | None, step: int, checkpoint: Path | None) -> str:
    """Returns that the run was stopped, with the command that resumes it."""
    how = "the same command resumes the run"
    if config.output_dir is None:
        how = f"the same command with --output-dir {folder} resumes the run"
    return f"stopped after {step} updates, {checkpoint}: {how}"
