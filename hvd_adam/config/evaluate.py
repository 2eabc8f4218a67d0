"""`EvaluateConfig`: the options of `python -m hvd_adam.evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvd_adam.config.checkpoint import CheckpointConfig
from hvd_adam.config.options import option, require
from hvd_adam.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig(CheckpointConfig):
    """Evaluates a checkpoint; each test image is counted exactly once at any number of ranks."""

    EXAMPLES: ClassVar[str] = """examples:
  horovodrun -np 2 python -m hvd_adam.evaluate --checkpoint runs/first
  python -m hvd_adam.evaluate --checkpoint runs/first --which best --json"""

    dataset: str | None = option(
        None, "data set to evaluate on, with the same classes (default: the one trained on)"
    )
    data_dir: str | None = option(None, "folder of the data set (default: as for training)", path=True)
    max_corrupt: int | None = option(
        None, "unreadable image files that each rank skips before it ends, ≥ 0 (default: as for training)"
    )
    batch_size: int = option(256, "samples per rank and batch, ≥ 1")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one, else the CPU")
    per_class: int = option(20, "the most classes to list, those with the lowest recall; 0: none")
    plot: str | None = option(
        None, "draw the confusion matrix and the reliability diagram to this PNG file", path=True
    )
    json: bool = option(False, "print one JSON object instead of lines of text")
    predictions: str | None = option(
        None,
        "file to write with a JSON object a line for each test sample: target, predicted, probabilities",
        path=True,
    )
    force: bool = option(False, "replace the files of --plot and --predictions if they exist")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch_size >= 1, "batch-size", self.batch_size, "at least 1")
        corrupt = self.max_corrupt
        require(corrupt is None or corrupt >= 0, "max-corrupt", corrupt, "0 or above")
        require(self.per_class >= 0, "per-class", self.per_class, "0 or above")
        if self.plot is not None:
            require(self.plot.lower().endswith(".png"), "plot", self.plot, "a file name that ends in .png")
        if self.json and self.per_class != type(self).per_class:
            raise UserError("--per-class has no effect with --json, which lists all classes; leave it out")
