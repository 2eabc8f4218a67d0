"""Measures what local steps change in the result of a training.

Makes the tables and the picture of docs/local_steps_measured.md.

    horovodrun -np 2 python docs/local_steps_quality.py [--seeds 5]
    horovodrun -np 2 python docs/local_steps_quality.py --grid --seeds 3

Trains the models of docs/compression_quality.py with averaged gradients, and with local steps (int4), on the same
batches. Each finished run is a line of JSON in --output, with the test loss along the run, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compression_quality import TASKS, Task, batches, evaluate, positive

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.compare.statistics import estimate
from hvd_adam.distributed.broadcast.tensors import broadcast_nested
from hvd_adam.distributed.local.training import meet, shared_weights
from hvd_adam.schedule import LearningRateSchedule, learning_rate

UPDATES = {"cnn": 600, "transformer": 600}
POINTS = 12  # of the curve of each run
PICTURE = Path(__file__).parent / "images/local-steps.png"


@dataclass(frozen=True)
class Row:
    """How ranks share their work: averaged gradients if `local_steps` is None."""

    local_steps: int | None = None
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    scaled: bool = False  # the learning rate of Adam times √ranks

    def __str__(self) -> str:
        scaled = ", lr·√N" if self.scaled else ""
        if self.local_steps is None:
            return f"averaged gradients{scaled}"
        return f"H = {self.local_steps}, outer {self.outer_lr:g} / {self.outer_momentum:g}{scaled}"

    def options(self) -> dict[str, Any]:
        """Returns the options of `distribute`."""
        if self.local_steps is None:
            return {}
        options = {key: value for key, value in asdict(self).items() if key != "scaled"}
        return {"strategy": "local", "compression": "int4", **options}


AVERAGED = Row()
ROWS = [AVERAGED, Row(scaled=True), *(Row(steps, scaled=True) for steps in (10, 50))]
GRID = [AVERAGED, *(Row(*values) for values in product((10, 50), (0.7, 1.0), (0.0, 0.5, 0.9)))]


def train(cluster: Cluster, task: Task, row: Row, updates: int, seed: int) -> dict[str, Any]:
    """Trains, and returns the final losses and accuracy, and the test loss along the run as "curve"."""
    torch.manual_seed(seed)
    model = task.model().to(cluster.device)
    rate = task.lr * (math.sqrt(cluster.size) if row.scaled else 1)
    optimizer = distribute(
        Adam(model.parameters(), lr=rate), model, max_grad_norm=task.max_grad_norm, **row.options()
    )
    schedule = LearningRateSchedule(rate, updates, warmup_steps=updates / 10, decay="cosine")
    samples, targets = (tensor.to(cluster.device) for tensor in task.train)
    curve = []
    for step, batch in zip(range(1, updates + 1), batches(len(samples), task.batch_size, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, schedule)
        own = batch[cluster.rank :: cluster.size].to(cluster.device)
        optimizer.zero_grad()
        F.cross_entropy(model(samples[own]).flatten(0, -2), targets[own].flatten()).backward()
        optimizer.step()
        if step == updates:
            meet(optimizer)
        if step % (updates // POINTS) == 0:
            model.eval()
            with shared_weights(optimizer, model, cluster):
                curve.append(evaluate(cluster, model, *task.test))
                train_loss = evaluate(cluster, model, *task.train)[0] if step == updates else 0.0
            model.train()
    (loss, accuracy), losses = curve[-1], [loss for loss, _ in curve]
    return {"train_loss": train_loss, "test_loss": loss, "test_accuracy": accuracy, "curve": losses}


def table(results: list[dict[str, Any]]) -> str:
    """Returns means ± standard errors, and differences to averaged gradients with the same seeds."""
    lines = ["| model | N | form | seeds | training loss | test loss | Δ | test accuracy | Δ |", "|---" * 9 + "|"]
    groups: dict[tuple[str, int, Row], dict[int, dict[str, Any]]] = {}
    for result in results:
        key = result["model"], result["ranks"], Row(**result["row"])
        groups.setdefault(key, {})[result["seed"]] = result
    for (model, ranks, row), runs in groups.items():
        base = groups.get((model, ranks, AVERAGED), {})
        seeds = sorted(runs.keys() & base.keys())
        own, other = [runs[seed] for seed in seeds], [base[seed] for seed in seeds]
        cells = [model, str(ranks), str(row), str(len(seeds))]
        cells += [shown([run[metric] for run in own]) for metric in ("train_loss", "test_loss")]
        pairs = list(zip(own, other, strict=True))
        cells.append(shown([100 * (a["test_loss"] / b["test_loss"] - 1) for a, b in pairs], "+.1f", " %"))
        cells.append(shown([run["test_accuracy"] for run in own]))
        cells.append(shown([a["test_accuracy"] - b["test_accuracy"] for a, b in pairs], "+.4f"))
        if row == AVERAGED:
            cells[6] = cells[8] = ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float], form: str = ".4f", unit: str = "") -> str:
    """Returns mean ± standard error."""
    found = estimate(values)
    if found.mean is None:
        return "–"
    return f"{found.mean:{form}}" + (f" ± {found.error:{form[-3:]}}" if found.error is not None else "") + unit


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the mean test losses along the runs into a PNG file."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(result["model"] for result in results))
    figure = Figure(figsize=(4.2 * len(models), 3.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for row in ROWS:
            curves = [r["curve"] for r in results if (r["model"], Row(**r["row"])) == (model, row)]
            means = [sum(losses) / len(curves) for losses in zip(*curves, strict=True)]
            places = [(index + 1) / POINTS for index in range(len(means))]
            axes.plot(places, means, "-" if row.local_steps is None else ".--", label=str(row))
        axes.set(title=model, xlabel="part of the training", ylabel="test loss", yscale="log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the finished runs of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Makes the runs that are missing, in the order of the seeds, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each row")
    parser.add_argument("--models", nargs="+", choices=UPDATES, default=[*UPDATES])
    parser.add_argument("--grid", action="store_true", help="outer learning rates and momenta")
    parser.add_argument("--updates", type=positive, help="updates of each run (default: those of the model)")
    parser.add_argument("--output", type=Path, default=Path("runs/local_steps_quality.jsonl"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    cluster, rows = init(), GRID if args.grid else ROWS
    with guard(cluster):
        torch.set_num_threads(1)  # the result of a run depends on it
        tasks = {name: TASKS[name]() for name in args.models}
        wanted = [
            {"model": name, "ranks": cluster.size, "row": asdict(row), "updates": args.updates or UPDATES[name]}
            | {"seed": seed}
            for seed, name, row in product(range(args.seeds), tasks, rows)
        ]
        results = broadcast_nested(read(args.output), "finished runs")
        for key in wanted:
            if any(key.items() <= result.items() for result in results):
                continue
            task, row = tasks[key["model"]], Row(**key["row"])
            results.append({**key, **train(cluster, task, row, key["updates"], key["seed"])})
            cluster.print({name: value for name, value in results[-1].items() if name != "curve"})
            if cluster.is_root:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(args.output, "".join(json.dumps(result) + "\n" for result in results))
        results = [
            next(r for r in results if key.items() <= r.items())
            for key in sorted(wanted, key=lambda key: (key["model"], rows.index(Row(**key["row"]))))
        ]
        cluster.print(table(results))
        if cluster.is_root and not args.grid:
            draw(results, args.picture)


if __name__ == "__main__":
    main()
