"""Compares the batch that `hvd_adam.advise` chooses with the best one of a grid, in time to a training loss.

    OMP_NUM_THREADS=1 python tests/advise_validation.py FOLDER train    # updates to the target, with each batch
    OMP_NUM_THREADS=1 python tests/advise_validation.py FOLDER time     # seconds of an update; on an idle machine,
    OMP_NUM_THREADS=1 horovodrun --gloo -np 2 python tests/advise_validation.py FOLDER time     # on 1 and 2 ranks
    OMP_NUM_THREADS=1 python tests/advise_validation.py FOLDER advise   # advice for runs with --noise-scale 1
    python tests/advise_validation.py FOLDER                            # the tables

The digits are trained with global batches of 8 to 512 samples and a learning rate that the square root rule scales
from that of 64, until the mean training loss of an epoch reaches the target. Time to the target is the median
number of updates over the seeds, times the seconds of an update on 1 or 2 ranks. Updates are counted on one
rank: N ranks make the same ones. Phases skip what is in FOLDER already.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

from hvd_adam.config import TrainConfig
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.schedule import scale

GRID = (8, 16, 32, 64, 128, 256, 512)
OWN = 64  # the batch of the run that is given advice, and of the learning rate
TARGETS = {"mlp": 0.1, "cnn": 0.05}  # mean training losses of an epoch
EPOCHS = {"mlp": (25, 70), "cnn": (8, 20)}  # for batches up to OWN, and larger ones
SEEDS = (0, 1, 2)
FORMS = ("gradient", "adam")  # of the noise scale
IMAGES = 1442
TIMED_SAMPLES, LEAST_TIMED, MOST_TIMED, TURNS = 4096, 10, 100, 2  # the last three: updates, and repetitions
HOROVODRUN = str(Path(sys.executable).with_name("horovodrun"))


def options(model: str, batch: int, **changes: Any) -> dict[str, Any]:
    """Returns the options of a training with a global batch, for any number of ranks."""
    scaled = scale(batch / OWN, "sqrt", lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    return {
        **{"model": model, "global_batch_size": batch, "lr_scaling": "none", "lr_decay": "constant"},
        **{"lr": scaled.lr, "betas": scaled.betas, "eps": scaled.eps},
        **{"eval_every": 10**6, "checkpoint_every": 10**9},
        **changes,
    }


def events(folder: Path, key: str) -> list[dict[str, Any]]:
    """Returns the `step` events that have a key."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "step" and key in line]


def train(folder: Path) -> None:
    """Trains with each batch and seed, and records the loss of each epoch; in this process, on one rank."""
    from hvd_adam.training.trainer import Trainer

    for model, seed, batch in ((m, s, b) for s in SEEDS for m in TARGETS for b in GRID):
        run = folder / f"{model}-{batch}-{seed}"
        if not (run / "done").exists():
            epochs = EPOCHS[model][batch > OWN]
            values = options(model, batch, seed=seed, epochs=epochs, log_every=IMAGES // batch, resume="auto")
            Trainer(TrainConfig(**values, output_dir=str(run))).run()
            (run / "done").touch()


def updates_to_target(run: Path, target: float) -> float:
    """Returns the updates until the loss of an epoch reaches the target; infinite if it does not.

    The mean loss of an epoch is that at its middle. Between two of them its logarithm is interpolated.
    """
    rows = events(run, "loss")
    length = rows[0]["step"]
    for before, after in pairwise(rows):
        if after["loss"] <= target:
            share = math.log(before["loss"] / target) / math.log(before["loss"] / after["loss"])
            return float(before["step"] - length / 2 + max(0.0, share) * (after["step"] - before["step"]))
    return math.inf


def words(values: dict[str, Any]) -> list[str]:
    """Returns options as words of a command line."""
    return [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    ]


def measure(folder: Path, models: Sequence[str]) -> None:
    """Measures updates with each batch, in turns, on the ranks of the launcher; every rank calls it."""
    from hvd_adam.training.trainer import Trainer

    ranks = detect_launcher().size
    for model, turn, batch in ((m, t, b) for m in models for t in range(TURNS) for b in GRID):
        steps = max(LEAST_TIMED, min(MOST_TIMED, TIMED_SAMPLES // batch))
        values = options(model, batch, max_steps=steps, epochs=10**4, log_every=steps // 10, resume="never")
        run = folder / f"time-{model}-{ranks}-{batch}-{turn}"
        Trainer(TrainConfig(**values, output_dir=str(run))).run()


def seconds_of_update(folder: Path, model: str, ranks: int, batch: int) -> float:
    """Returns the least of the turns' medians, since other programs only lengthen an update."""
    runs = folder.glob(f"time-{model}-{ranks}-{batch}-*")
    return batch / max(median(row["images_per_second"] for row in events(run, "loss")[3:]) for run in runs)


def advise(folder: Path, models: Sequence[str], ranks: Sequence[int]) -> None:
    """Trains with --noise-scale to the target, and asks for advice."""
    for model, size, form in product(models, ranks, FORMS):
        run = folder / f"advised-{model}-{size}-{form}"
        if not run.exists():
            steps = round(
                median(updates_to_target(folder / f"{model}-{OWN}-{seed}", TARGETS[model]) for seed in SEEDS)
            )
            values = options(model, OWN, noise_scale=1, max_steps=steps, epochs=10**4, accumulate=2 // size)
            values["noise_scale_form"] = form
            launcher = [HOROVODRUN, "--gloo", "-np", str(size)] if size > 1 else []
            command = [*launcher, sys.executable, "-m", "hvd_adam.train"]
            subprocess.run([*command, *words({**values, "output_dir": str(run)})], check=True)
        command = [sys.executable, "-m", "hvd_adam.advise", str(run), "--confirm", "--launcher", "gloo", "--json"]
        command += ["--batches", ",".join(map(str, GRID))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        (folder / f"advice-{model}-{size}-{form}.json").write_text(done.stdout)


def tables(folder: Path) -> None:
    """Prints the time to the target with each batch, and that of the advised one relative to the best."""
    for path in sorted(folder.glob("advice-*.json")):
        _, model, size, form = path.stem.split("-")
        advice = json.loads(path.read_text())
        counts = {
            b: median(updates_to_target(folder / f"{model}-{b}-{seed}", TARGETS[model]) for seed in SEEDS)
            for b in GRID
        }
        times = {b: counts[b] * seconds_of_update(folder, model, int(size), b) for b in GRID}
        best = min(times, key=times.__getitem__)
        chosen = advice["soonest"]["global_batch"]
        rows = sorted(advice["rows"], key=lambda row: -row["relative_time"])
        predicted = {row["global_batch"]: row["relative_time"] for row in rows}  # of equal batches the soonest
        noise = advice["noise_scale"]["value"]
        shown = "infinity" if noise is None else f"{noise:.0f}"
        print(f"\n{model}, {size} rank(s): noise scale {shown} samples, form {form}")
        print(
            "| batch | updates | ms per update | s to the target | relative to the best | advisor's, to its best |"
        )
        print("|---|---|---|---|---|---|")
        for b in GRID:
            shown = f"{predicted[b] / min(predicted.values()):.2f}" if b in predicted else "-"
            each = 1e3 * times[b] / counts[b] if math.isfinite(times[b]) else math.nan
            print(
                f"| {b} | {counts[b]:.0f} | {each:.2f} | {times[b]:.2f} | {times[b] / times[best]:.2f} | {shown} |"
            )
        confirmed = advice["confirmed"] and advice["confirmed"]["soonest"]
        for what, batch in (("best", best), ("advised", chosen), ("confirmed", confirmed)):
            if batch:
                print(f"{what} {batch}: {times[batch] / times[best]:.2f} of the best time")


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("phase", nargs="?", choices=("train", "time", "advise"))
    parser.add_argument("--models", default=",".join(TARGETS))
    parser.add_argument("--ranks", default="1,2")
    arguments = parser.parse_args()
    folder, models = arguments.folder, arguments.models.split(",")
    ranks = [*map(int, arguments.ranks.split(","))]
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.phase == "train":
        train(folder)
    elif arguments.phase == "time":
        measure(folder, models)
    elif arguments.phase == "advise":
        advise(folder, models, ranks)
    else:
        tables(folder)


if __name__ == "__main__":
    main()
