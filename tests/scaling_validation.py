"""Compares predicted with measured steps on two hosts, made of namespaces, with slow links between them.

    python tests/scaling_validation.py FOLDER [--ranks 2,4] [--links 100Mbit,1Gbit] [--models mlp,cnn]

Measures each model over each link with every strategy and compression, in turns, and prints each prediction next
to the median of the steps, and the errors next to how well measurements repeat: the difference between the medians
of even and of odd turns. What is in FOLDER already is not measured again, so that measurements can be divided into
several calls. Before each model and link it calibrates with two ranks inside one host, since the speed of a
virtual machine changes within minutes. Needs root.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from helpers.scaling_worker import COMPUTING

from hvd_adam.bench.interleave import Plan
from hvd_adam.bench.link import limited_link
from hvd_adam.simulate import calibration
from hvd_adam.simulate.config import PredictConfig
from hvd_adam.simulate.predict import forecasts_of

ROOT = Path(__file__).parents[1]
MODELS = {"mlp": "helpers.scaling_models:mlp", "cnn": "cnn", "transformer": "helpers.scaling_models:transformer"}
LINKS = ("1Gbit", "300Mbit", "3Gbit", "100Mbit")
RATES = {"100Mbit": 100_000_000, "300Mbit": 300_000_000, "1Gbit": 1_000_000_000, "3Gbit": 3_000_000_000}
BATCH = 16
COLUMNS = (
    *("settings", "number", "median error", "worst", "within 15 %", "median, same computing"),
    *("repeats within", "right order", "if it repeats"),
)
MOST_FOREIGN = 0.15  # cores; turns in which other programs used more do not count
LEAST_BURST = 32 * 1024  # bytes that pass a link at once after a pause; else those of 1 ms
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))
ENVIRON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}


def calibrate(launcher: str, model: str, file: Path) -> None:
    """Calibrates two ranks inside one host."""
    options = ["--models", MODELS[model], "--batch-size", str(BATCH), "--repeats", "8"]
    options += ["--output", str(file), "--force"]
    plan = plan_of(launcher, 2, "hvd_adam.simulate", "calibrate", *options)
    subprocess.run(plan.command, check=True, env={**os.environ, **plan.environ})


def measure(launcher: str, model: str, ranks: int, link: str, file: Path) -> None:
    """Measures a model over a link."""
    plan = plan_of(launcher, ranks, "helpers.scaling_worker", MODELS[model], str(BATCH), str(file.absolute()))
    with limited_link(RATES[link], burst=max(LEAST_BURST, RATES[link] // 8000)) as hosts:
        plan = hosts.over(plan, ranks // 2)
        subprocess.run(plan.command, check=True, env={**os.environ, **plan.environ})


def plan_of(launcher: str, ranks: int, *module: str) -> Plan:
    """Returns how a module is run on ranks, each on the core of its host."""
    launch = (HOROVODRUN, "-np", str(ranks), f"--{launcher}", sys.executable, "-m", "helpers.on_own_core")
    return Plan("", {}, (*launch, *module), ENVIRON)


def predict(file: Path, model: str, ranks: int, link: str, setting: str) -> float:
    """Returns the predicted seconds of a step. Each host has one core of this machine."""
    strategy, compression = setting.split("-")
    config = PredictConfig(
        calibration=str(file),
        model=MODELS[model],
        ranks=str(ranks),
        ranks_per_host=ranks // 2,
        cores_per_host=1.0,
        bandwidth=link,
        strategy=strategy,  # type: ignore[arg-type]
        compression=compression,  # type: ignore[arg-type]
    )
    (row,), _ = forecasts_of(config)
    return row.step.seconds


Place = tuple[str, int, str]  # model, ranks, link
Times = dict[str, list[list[float]]]  # of each turn, by "strategy-compression": see helpers.scaling_worker

Measured = dict[Place, tuple[Path, Times]]  # with the calibration made before


class Row(NamedTuple):
    """A setting.

    Attributes:
        place, name: of it.
        measured, predicted: seconds of a step.
        same_computing: predicted with the computing that was measured next to the step, not by the calibration.
        halves: seconds measured in even and in odd turns.
    """

    place: Place
    name: str
    measured: float
    predicted: float
    same_computing: float
    halves: tuple[float, float]

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    @property
    def repeats(self) -> float:
        """Relative difference of the halves."""
        return abs(self.halves[0] / self.halves[1] - 1)


def rows_of(measured: Measured) -> list[Row]:
    """Returns a row for each setting that has been measured in two turns without other programs."""
    rows = []
    for place, (file, times) in measured.items():
        slowed = with_computing(file, place, times[COMPUTING])
        for name, turns in times.items():
            if name == COMPUTING:
                continue
            quiet = [steps for foreign, *steps in turns if foreign < MOST_FOREIGN]
            if len(quiet) < 2:
                continue
            seconds, *halves = (median(chain(*part)) for part in (quiet, quiet[::2], quiet[1::2]))
            both = [predict(made, *place, name) for made in (file, slowed)]
            rows.append(Row(place, name, seconds, *both, (halves[0], halves[1])))
    return rows


def with_computing(file: Path, place: Place, turns: list[list[float]]) -> Path:
    """Returns a calibration with the time of computing that was measured in a place, where ranks share cores."""
    model, ranks, _ = place
    made = calibration.read(str(file))
    workload = made.workloads[MODELS[model]]
    seconds = median(chain(*(steps for _, *steps in turns))) / (ranks / 2)
    slower = replace(workload.slower(seconds / (workload.forward + workload.backward)), sharing=1.0)
    path = file.with_name("slowed.json")
    path.write_text(replace(made, workloads={MODELS[model]: slower}).to_json())
    return path


def summary(label: str, rows: list[Row]) -> str:
    """Returns a line of the table of errors."""
    errors = [abs(row.error) for row in rows]
    repeats = median(row.repeats for row in rows)
    pairs = [(a, b) for a, b in combinations(rows, 2) if a.place == b.place]
    right = [(a.measured < b.measured) == (a.predicted < b.predicted) for a, b in pairs]
    # Pairs whose order the measurement itself repeats.
    clear = [
        ok
        for ok, (a, b) in zip(right, pairs, strict=True)
        if (a.halves[0] < b.halves[0]) == (a.halves[1] < b.halves[1])
    ]
    cells = (
        label,
        f"{len(rows)}",
        f"{median(errors):.1%}",
        f"{max(errors):.1%}",
        f"{sum(error <= 0.15 for error in errors)}",
        f"{median(abs(row.same_computing / row.measured - 1) for row in rows):.1%}",
        f"{repeats:.1%}",
        f"{sum(right) / max(1, len(right)):.0%}",
        f"{sum(clear) / max(1, len(clear)):.0%} of {len(clear)}",
    )
    return f"| {' | '.join(cells)} |"


def compare(measured: Measured) -> None:
    """Prints every setting, and tables of the errors."""
    rows = rows_of(measured)
    settings_in_all = sum(len(times) - 1 for _, times in measured.values())
    print(f"{len(rows)} of {settings_in_all} settings have two undisturbed turns")
    if not rows:
        return
    print("model        ranks link    setting         measured ms predicted ms   error  repeats")
    for row in rows:
        model, ranks, link = row.place
        print(
            f"{model:<12} {ranks:>5} {link:<7} {row.name:<15} {row.measured * 1e3:>11.1f} "
            f"{row.predicted * 1e3:>12.1f} {row.error:>7.1%} {row.repeats:>8.1%}"
        )
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    print(summary("all", rows))
    keys: list[Callable[[Row], str]] = [
        lambda row: f"{row.place[1]} ranks",
        lambda row: row.place[2],
        lambda row: row.place[0],
        lambda row: row.name.split("-")[0],
        lambda row: row.name.split("-")[1],
    ]
    for key in keys:
        for label in dict.fromkeys(map(key, rows)):
            print(summary(label, [row for row in rows if key(row) == label]))


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher", choices=("mpi", "gloo"), default="mpi")
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--links", default=",".join(LINKS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--within", type=float, default=math.inf, help="calibrate no more after so many seconds")
    arguments = parser.parse_args()
    folder, end = arguments.folder, time.monotonic() + arguments.within
    folder.mkdir(exist_ok=True)
    ranks = [*map(int, arguments.ranks.split(","))]
    made: Measured = {}
    for model, link in product(arguments.models.split(","), arguments.links.split(",")):
        runs = {n: folder / f"{model}-{n}-{link}.json" for n in ranks}
        missing = [n for n, run in runs.items() if not run.exists()]
        if missing and time.monotonic() < end:
            file = folder / f"calibration-{model}-{link}-{'-'.join(map(str, missing))}.json"
            calibrate(arguments.launcher, model, file)
            for n in missing:
                measure(arguments.launcher, model, n, link, folder / "steps.json")
                whole = {"calibration": file.name, "steps": json.loads((folder / "steps.json").read_text())}
                runs[n].write_text(json.dumps(whole))
        for n, run in runs.items():
            if run.exists():
                whole = json.loads(run.read_text())
                made[model, n, link] = folder / whole["calibration"], whole["steps"]
    compare(made)


if __name__ == "__main__":
    main()
