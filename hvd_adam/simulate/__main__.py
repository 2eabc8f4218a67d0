"""Predicts how a job scales before the machines are booked, and measures what the prediction needs.

horovodrun -np 2 python -m hvd_adam.simulate calibrate --models mlp,cnn
python -m hvd_adam.simulate predict --calibration calibration.json --model cnn --bandwidth 1Gbit --html cnn.html
python -m hvd_adam.simulate predict --preset p100-roce25 --model resnet101 --ranks 4,512
python -m hvd_adam.simulate tune --calibration calibration.json --bandwidth 300Mbit --ranks 2,4 --ranks-per-host 1
"""

import sys
from typing import Any

from hvd_adam.cli import run, subcommand
from hvd_adam.extras import require
from hvd_adam.loading import loading_modules
from hvd_adam.simulate.config import CalibrateConfig, PredictConfig, TuneConfig

NAME = "hvd_adam.simulate"
COMMANDS: dict[str, type[Any]] = {"calibrate": CalibrateConfig, "predict": PredictConfig, "tune": TuneConfig}


def calibrate(config: CalibrateConfig) -> None:
    """Measures; runs on every rank."""
    with loading_modules():  # here: --help and a bad value answer before torch is loaded
        from hvd_adam.simulate.measure import calibrate as measure

    measure(config)


def predict(config: PredictConfig) -> None:
    """Predicts, in one process; loads no torch."""
    if config.plot or config.html:
        require("matplotlib", "jinja2")
    from hvd_adam.simulate.predict import predict as forecast

    forecast(config)


def tune(config: TuneConfig) -> None:
    """Compares options, in one process; loads no torch."""
    from hvd_adam.simulate.tune import tune as compare

    compare(config)


def main(argv: list[str]) -> None:
    """Takes the subcommand from the first argument, and its options from the others."""
    command = subcommand(argv, COMMANDS, NAME, __doc__ or "")
    mains: dict[str, Any] = {"calibrate": calibrate, "predict": predict, "tune": tune}
    run(mains[command], COMMANDS[command], f"{NAME} {command}", argv[1:], needs_extra=True)


if __name__ == "__main__":
    main(sys.argv[1:])
