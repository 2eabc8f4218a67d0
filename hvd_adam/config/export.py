"""`ExportConfig`: the options of `python -m hvd_adam.export`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvd_adam.config.checkpoint import CheckpointConfig
from hvd_adam.config.options import option
from hvd_adam.errors import UserError


@dataclass(frozen=True)
class ExportConfig(CheckpointConfig):
    """Writes a trained model to one file that other programs load, and compares its outputs with the model's."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.export --checkpoint runs/photos --format onnx --output photos.onnx
  python -m hvd_adam.export --checkpoint runs/photos --which best --format torch --output photos.pt2"""

    format: Literal["torch", "onnx", "safetensors"] = option(
        "torch", "torch: a program of torch.export, which needs only torch; onnx; safetensors: the weights alone"
    )
    output: str = option("", "the file to write; required", path=True)
    force: bool = option(False, "replace the file if it exists")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output:
            raise UserError("--output is missing: give the file to write, such as model.onnx")
