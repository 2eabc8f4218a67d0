"""Classifies image files with a trained model, in one process.

python -m hvd_adam.predict --checkpoint runs/photos cat.jpg dog.png
python -m hvd_adam.predict --checkpoint runs/photos --top 3 --json photos/new
"""

from hvd_adam.cli import run
from hvd_adam.config import PredictConfig
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules


def main(config: PredictConfig) -> None:
    """Classifies the files."""
    require("torch", "torchvision", "PIL")
    # Imported here, so that --help and a bad value are answered before PyTorch is loaded.
    with loading_modules():
        from hvd_adam.predict.command import predict

    predict(config)


if __name__ == "__main__":
    run(main, PredictConfig, "hvd_adam.predict", needs_extra=True)
