"""Compares Adam with other optimizers on the same data, seeds and budget, with tests of significance.

python -m hvd_adam.compare
horovodrun -np 2 python -m hvd_adam.compare --output-dir runs/compare
python -m hvd_adam.compare --study vanishing
"""

from hvd_adam.cli import run
from hvd_adam.compare.config import CompareConfig
from hvd_adam.extras import require


def main(config: CompareConfig) -> None:
    """Compares; runs on every rank."""
    require("matplotlib", "scipy")
    # Imported here, so that --help and a bad value are answered before PyTorch is loaded.
    from hvd_adam.compare.command import compare

    compare(config)


if __name__ == "__main__":
    run(main, CompareConfig, "hvd_adam.compare", needs_extra=True)
