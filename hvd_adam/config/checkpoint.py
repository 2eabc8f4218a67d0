"""`CheckpointConfig`: the options of all commands that read a checkpoint. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvd_adam.config.options import option
from hvd_adam.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoint, and the device to use it on."""

    checkpoint: str = option("", "run folder, its checkpoints folder or one checkpoint; required", path=True)
    which: Literal["newest", "best"] = option(
        "newest", "checkpoint of a run folder: the newest, or the best on the test set"
    )
    weights: Literal["auto", "ema", "model"] = option(
        "auto", "ema: the moving average of --ema; model: the weights themselves; auto: ema if there is one"
    )

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("--checkpoint is missing: give a run folder or a checkpoint")
