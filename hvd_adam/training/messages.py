"""Lines that a run prints: its first line, where it resumes, how it ends."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hvd_adam._version import __version__
from hvd_adam.config import TrainConfig
from hvd_adam.data.protocols import Data, Loader
from hvd_adam.distributed.context import Cluster
from hvd_adam.distributed.local.islands import count_islands
from hvd_adam.training.plots import CROSS_ENTROPY
from hvd_adam.training.run import BatchSizes
from hvd_adam.training.tuning.options import Choice

NO_ACCURACY = (
    "accuracy needs outputs of shape (samples, classes) and labels, so there is none: the best checkpoint is the "
    "one with the lowest test loss"
)


def start_facts(
    config: TrainConfig,
    cluster: Cluster,
    sizes: BatchSizes,
    loader: Loader,
    model: torch.nn.Module,
    choice: Choice | None,
) -> dict[str, Any]:
    """Returns what the events "start" and "resume" record, with the choice of `--tune`."""
    data = loader.description()
    return {
        "loss_function": config.loss or CROSS_ENTROPY,
        "world_size": cluster.size,
        "launcher": cluster.launcher,
        "global_batch_size": sizes.global_batch,
        "total_steps": sizes.total_steps,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": {"hvd_adam": __version__, "torch": torch.__version__},
        "data": {key: data[key] for key in ("classes", "train_images", "test_images", "fingerprint")},
        "noise_scale_form": None if config.noise_scale is None else config.noise_scale_form,
        "tune": None if choice is None else asdict(choice),
    }


def first_line(config: TrainConfig, data: Data, cluster: Cluster, sizes: BatchSizes) -> str:
    """Returns what is trained on what, and how it is divided into updates."""
    ranks = f"{cluster.size} rank(s)"
    if config.islands is not None:
        islands = count_islands(config.islands, cluster)
        ranks += f" in {islands} island(s) of {cluster.size // islands}"
    return (
        f"hvd_adam {__version__}: {config.model} on {config.dataset} ({data.summary()}), {ranks} "
        f"on {cluster.device.type}, {sizes.global_batch} samples per update, {sizes.total_steps} updates"
    )


def finished(config: TrainConfig, sizes: BatchSizes, step: int) -> str:
    """Returns that a run has ended already, with the options that lengthen it."""
    by_epochs = config.epochs * sizes.steps_per_epoch
    remedy = "--epochs" if config.max_steps is None or config.max_steps > by_epochs else "--max-steps"
    if config.max_steps == by_epochs:
        remedy = "--epochs and --max-steps"
    return f"already finished: {step} of {sizes.total_steps} updates; raise {remedy} to continue"


def stopped(config: TrainConfig, folder: Path | None, step: int, checkpoint: Path | None) -> str:
    """Returns that the run was stopped, with the command that resumes it."""
    how = "the same command resumes the run"
    if config.output_dir is None:
        how = f"the same command with --output-dir {folder} resumes the run"
    return f"stopped after {step} update{'s' * (step != 1)}, {checkpoint}: {how}"
