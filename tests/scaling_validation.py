"""Compares predicted with measured steps on two hosts, made of namespaces, with slow links between them.

    python tests/scaling_validation.py FOLDER [--ranks 2,4] [--links 100Mbit,1Gbit] [--models mlp,cnn]

Calibrates with two ranks inside one host, measures each model over each link with every strategy and compression,
and prints each prediction next to its measurement, and the errors. What is in FOLDER already is not measured
again, so that measurements can be divided into several calls. Needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from statistics import median

from hvd_adam.bench.interleave import Plan
from hvd_adam.bench.link import limited_link
from hvd_adam.simulate.config import PredictConfig
from hvd_adam.simulate.predict import forecasts_of

ROOT = Path(__file__).parents[1]
MODELS = {"mlp": "helpers.scaling_models:mlp", "cnn": "cnn", "transformer": "helpers.scaling_models:transformer"}
LINKS = ("100Mbit", "300Mbit", "1Gbit", "3Gbit")
RATES = {"100Mbit": 100_000_000, "300Mbit": 300_000_000, "1Gbit": 1_000_000_000, "3Gbit": 3_000_000_000}
BATCH = 16
LEAST_BURST = 32 * 1024  # bytes that pass a link at once after a pause; else those of 1 ms
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))
ENVIRON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}


def calibrate(launcher: str, file: Path) -> None:
    """Calibrates inside one host, unless that has been done."""
    if not file.exists():
        launch = [HOROVODRUN, f"--{launcher}", "-np", "2", sys.executable, "-m", "hvd_adam.simulate", "calibrate"]
        options = ["--models", ",".join(MODELS.values()), "--batch-size", str(BATCH), "--output", str(file)]
        subprocess.run([*launch, *options], check=True, env={**os.environ, **ENVIRON})


def measure(launcher: str, model: str, ranks: int, link: str, file: Path) -> None:
    """Measures a model, unless that has been done."""
    if file.exists():
        return
    worker = (sys.executable, "-m", "helpers.scaling_worker", MODELS[model], str(BATCH), str(file.absolute()))
    plan = Plan("", {}, (HOROVODRUN, "-np", str(ranks), f"--{launcher}", *worker), ENVIRON)
    with limited_link(RATES[link], burst=max(LEAST_BURST, RATES[link] // 8000)) as hosts:
        plan = hosts.over(plan, ranks // 2)
        subprocess.run(plan.command, check=True, env={**os.environ, **plan.environ})


def predict(calibration: Path, model: str, ranks: int, link: str, setting: str) -> float:
    """Returns the predicted seconds of a step. The hosts share the cores of this machine."""
    strategy, compression = setting.split("-")
    config = PredictConfig(
        calibration=str(calibration),
        model=MODELS[model],
        ranks=str(ranks),
        ranks_per_host=ranks // 2,
        cores_per_host=len(os.sched_getaffinity(0)) / 2,
        bandwidth=link,
        strategy=strategy,  # type: ignore[arg-type]
        compression=compression,  # type: ignore[arg-type]
    )
    (row,), _ = forecasts_of(config)
    return row.step.seconds


def compare(calibration: Path, measured: dict[tuple[str, int, str], dict[str, float]]) -> None:
    """Prints the table and the errors."""
    errors, pairs = [], []
    print("model        ranks link    setting         measured ms predicted ms  error")
    for (model, ranks, link), times in measured.items():
        predicted = {name: predict(calibration, model, ranks, link, name) for name in times}
        for name, seconds in times.items():
            errors.append(predicted[name] / seconds - 1)
            print(
                f"{model:<12} {ranks:>5} {link:<7} {name:<15} {seconds * 1e3:>11.1f} "
                f"{predicted[name] * 1e3:>12.1f} {errors[-1]:>6.1%}"
            )
        pairs += [(times[a] < times[b]) == (predicted[a] < predicted[b]) for a, b in combinations(times, 2)]
    sizes = list(map(abs, errors))
    print(f"{len(sizes)} settings: error {median(sizes):.1%} (median), {max(sizes):.1%} (worst); ", end="")
    print(f"{sum(size <= 0.15 for size in sizes)} within 15%; right order of {sum(pairs)} of {len(pairs)} pairs")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher", choices=("mpi", "gloo"), default="mpi")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--models", default=",".join(MODELS))
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(exist_ok=True)
    calibrate(arguments.launcher, folder / "calibration.json")
    measured = {}
    for ranks, link, model in settings(arguments):
        file = folder / f"{model}-{ranks}-{link}.json"
        measure(arguments.launcher, model, ranks, link, file)
        measured[model, ranks, link] = json.loads(file.read_text())
    compare(folder / "calibration.json", measured)


def settings(arguments: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """Yields ranks, link and model."""
    ranks = map(int, arguments.ranks.split(","))
    yield from product(ranks, arguments.links.split(","), arguments.models.split(","))


if __name__ == "__main__":
    main()
