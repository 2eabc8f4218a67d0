"""`PredictConfig`: the options of `python -m hvd_adam.predict`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvd_adam.config.checkpoint import CheckpointConfig
from hvd_adam.config.options import option, require
from hvd_adam.errors import UserError


@dataclass(frozen=True)
class PredictConfig(CheckpointConfig):
    """Classifies image files with a trained model, in one process."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.predict --checkpoint runs/photos cat.jpg dog.png
  python -m hvd_adam.predict --checkpoint runs/photos --which best --top 3 --json photos/new > predictions.jsonl"""

    files: tuple[str, ...] = option(
        (), "image files, folders whose images are classified, and - for an image on stdin", positional="FILE"
    )
    top: int = option(1, "classes to print for each file, the most probable first, ≥ 1")
    json: bool = option(False, "print a JSON object a line instead of columns")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one, else the CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.files:
            raise UserError("no file given: write image files or folders, as in cat.jpg photos/new")
        if self.files.count("-") > 1:
            raise UserError("- is given twice: stdin has one image; name the files of the others")
        require(self.top >= 1, "top", self.top, "at least 1")
