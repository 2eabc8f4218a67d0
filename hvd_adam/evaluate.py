"""Evaluates a checkpoint, each test image counted exactly once at any number of ranks.

python -m hvd_adam.evaluate --checkpoint runs/…
horovodrun -np 2 python -m hvd_adam.evaluate --checkpoint runs/…
"""

from hvd_adam.cli import run
from hvd_adam.config import EvaluateConfig
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules


def main(config: EvaluateConfig) -> None:
    """Evaluates; runs on every rank."""
    if config.plot is not None:
        require("matplotlib")
    # Imported here, so that --help and a bad value are answered before PyTorch is loaded.
    with loading_modules():
        from hvd_adam.training.evaluation import evaluate

    evaluate(config)


if __name__ == "__main__":
    run(main, EvaluateConfig, "hvd_adam.evaluate", needs_extra=True)
