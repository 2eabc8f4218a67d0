"""Writes a trained model to one file that other programs load, and compares its outputs with the model's.

python -m hvd_adam.export --checkpoint runs/photos --format onnx --output photos.onnx
"""

from hvd_adam.cli import run
from hvd_adam.config import ExportConfig
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules

NEEDED = {"torch": (), "onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


def main(config: ExportConfig) -> None:
    """Exports the model."""
    require("torch", *NEEDED[config.format])
    # Imported here, so that --help and a bad value are answered before PyTorch is loaded.
    with loading_modules():
        from hvd_adam.export.command import export

    export(config)


if __name__ == "__main__":
    run(main, ExportConfig, "hvd_adam.export", needs_extra=True)
