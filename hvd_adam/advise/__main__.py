"""Advises the batch size and the number of ranks with which a run reaches a loss soonest, and cheapest.

python -m hvd_adam.advise runs/first --measure
python -m hvd_adam.advise runs/first --calibration calibration.json --ranks 2,4,8 --bandwidth 1Gbit
python -m hvd_adam.advise runs/first --confirm
"""

from hvd_adam.cli import run
from hvd_adam.config import AdviseConfig
from hvd_adam.extras import require


def main(config: AdviseConfig) -> None:
    """Writes the advice."""
    require("tqdm", "yaml")
    # Imported here, so that --help and a bad value are answered first, and without these packages.
    from hvd_adam.advise.command import advise

    advise(config)


if __name__ == "__main__":
    run(main, AdviseConfig, "hvd_adam.advise", needs_extra=True)
