"""Measures what local steps change in the result of a training: the table of docs/local_steps.md.

    horovodrun -np 2 python docs/local_steps_quality.py [--seeds 5]

Trains the models of docs/compression_quality.py with averaged gradients, and with local steps, on the same
batches. Each finished run is a line of JSON in --output, with the test loss along the run, and is not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compression_quality import TASKS, Task, batches, evaluate, positive

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.compare.statistics import estimate
from hvd_adam.distributed.local.training import meet, shared_weights
from hvd_adam.schedule import LearningRateSchedule, learning_rate

PLAIN = {"outer_lr": 1.0, "outer_momentum": 0.0}  # the outer step is the mean of the local weights
ROWS: dict[str, dict[str, Any]] = {
    "averaged gradients": {},
    "local, H = 10, int4": {"strategy": "local", "local_steps": 10, "compression": "int4"},
    "local, H = 10, int4, mean": {"strategy": "local", "local_steps": 10, "compression": "int4", **PLAIN},
    "local, H = 50, int4": {"strategy": "local", "local_steps": 50, "compression": "int4"},
    "local, H = 50, int4, mean": {"strategy": "local", "local_steps": 50, "compression": "int4", **PLAIN},
}
UPDATES = {"cnn": 600, "transformer": 600}
POINTS = 6  # of the curve of each run


def train(cluster: Cluster, task: Task, row: str, updates: int, seed: int) -> dict[str, Any]:
    """Trains, and returns the final losses and accuracy, and the test loss along the run as "curve"."""
    torch.manual_seed(seed)
    model = task.model().to(cluster.device)
    adam = Adam(model.parameters(), lr=task.lr)
    optimizer = distribute(adam, model, max_grad_norm=task.max_grad_norm, **ROWS[row])
    schedule = LearningRateSchedule(task.lr, updates, warmup_steps=updates / 10, decay="cosine")
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
            with shared_weights(optimizer):
                curve.append(evaluate(cluster, model, *task.test))
                train_loss = evaluate(cluster, model, *task.train)[0] if step == updates else 0.0
            model.train()
    (loss, accuracy), losses = curve[-1], [loss for loss, _ in curve]
    return {"train_loss": train_loss, "test_loss": loss, "test_accuracy": accuracy, "curve": losses}


def table(results: list[dict[str, Any]]) -> str:
    """Returns means ± standard errors, differences to averaged gradients, and the mean test loss along the run."""
    lines = [
        "| model | exchange | seeds | training loss | test loss | Δ | test accuracy | test loss along the run |"
    ]
    lines.append("|---" * 8 + "|")
    for model, row in dict.fromkeys((result["model"], result["row"]) for result in results):
        own = [r for r in results if (r["model"], r["row"]) == (model, row)]
        base = {r["seed"]: r for r in results if (r["model"], r["row"]) == (model, next(iter(ROWS)))}
        own = [r for r in own if r["seed"] in base]
        cells = [model, row, str(len(own)), *(shown([r[m] for r in own]) for m in ("train_loss", "test_loss"))]
        change = estimate([r["test_loss"] / base[r["seed"]]["test_loss"] - 1 for r in own])
        cells.append(f"{100 * (change.mean or 0):+.1f} %")
        cells.append(shown([r["test_accuracy"] for r in own]))
        cells.append(
            " ".join(f"{sum(losses) / len(own):.3f}" for losses in zip(*(r["curve"] for r in own), strict=True))
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float]) -> str:
    """Returns mean ± standard error."""
    found = estimate(values)
    return f"{found.mean:.4f}" + (f" ± {found.error:.4f}" if found.error is not None else "")


def main() -> None:
    """Makes the runs that are missing, in the order of the seeds, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each row")
    parser.add_argument("--models", nargs="+", choices=UPDATES, default=[*UPDATES])
    parser.add_argument("--updates", type=positive, help="updates of each run (default: those of the model)")
    parser.add_argument("--output", type=Path, default=Path("runs/local_steps_quality.jsonl"))
    args = parser.parse_args()
    cluster = init()
    with guard(cluster):
        torch.set_num_threads(1)  # the result of a run depends on it
        results: list[dict[str, Any]] = []
        if args.output.exists():
            results = [json.loads(line) for line in args.output.read_text().splitlines()]
        tasks = {name: TASKS[name]() for name in args.models}
        for seed in range(args.seeds):
            for name, task in tasks.items():
                for row in ROWS:
                    updates = args.updates or UPDATES[name]
                    key = {"model": name, "row": row, "updates": updates, "seed": seed}
                    if cluster.gather([int(any(key.items() <= r.items() for r in results))])[0][0]:
                        continue
                    results.append({**key, **train(cluster, task, row, updates, seed)})
                    cluster.print(results[-1])
                    if cluster.is_root:
                        args.output.parent.mkdir(parents=True, exist_ok=True)
                        write_atomically(args.output, "".join(json.dumps(result) + "\n" for result in results))
        cluster.print(table(results))


if __name__ == "__main__":
    main()
