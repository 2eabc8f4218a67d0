"""Measures what the format of Adam's state changes in a training: table and picture of docs/state_formats.md.

    python docs/state_formats_quality.py [--seeds 10]

Trains small models with each format, on one thread. A seed decides the initial weights and the batches, which are
the same for all formats. Each finished run is a line of JSON in --output, and is not repeated. The runs are
made one after the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compression_quality import METRICS, TASKS, Task, batches, compared, positive
from torch import Tensor, nn

from hvd_adam import Adam
from hvd_adam.compare.statistics import estimate
from hvd_adam.data import synthetic
from hvd_adam.models.zoo import build
from hvd_adam.schedule import LearningRateSchedule, learning_rate

FORMATS = ("float32", "bfloat16", "8bit")
POINTS = 20  # of a learning curve: mean losses of as many parts of the training
PICTURE = Path(__file__).parent / "images/state-formats.png"

Results = dict[tuple[str, str, int], dict[str, Any]]  # by model, format and seed


def resnet18() -> Task:
    """Returns a classifier of synthetic images of CIFAR-10's shape: 320 for training and 64 for testing."""
    data = synthetic.load(samples=320)

    def tensors(images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(images).float() / 255 - 0.5, torch.as_tensor(labels).long()

    return Task(
        lambda: build("resnet18", sample_shape=data.sample_shape, num_classes=10, try_out=False),
        tensors(data.train_images, data.train_labels),
        tensors(data.test_images, data.test_labels),
        updates=60,
        lr=3e-4,
        batch_size=16,
    )


MODELS: dict[str, Callable[[], Task]] = {**TASKS, "resnet18": resnet18}


def train(task: Task, state_format: str, seed: int) -> dict[str, Any]:
    """Trains, and returns the losses and the accuracy of both sets, and the learning curve."""
    torch.manual_seed(seed)
    model = task.model()
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    others = [p for p in model.parameters() if p not in embeddings]
    groups = [{"params": others}, *({"params": [p], "state_format": "float32"} for p in embeddings)]
    optimizer = Adam(groups, lr=task.lr, implementation="fused", state_format=state_format)
    schedule = LearningRateSchedule(task.lr, task.updates, warmup_steps=task.updates / 10, decay="cosine")
    (samples, targets), losses = task.train, []
    for step, batch in zip(range(task.updates), batches(len(samples), task.batch_size, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(samples[batch]).flatten(0, -2), targets[batch].flatten())
        loss.backward()
        if task.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.max_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    (train_loss, _), (test_loss, accuracy) = (evaluate(model, *data) for data in (task.train, task.test))
    curve = [part.mean().item() for part in torch.stack(losses).chunk(POINTS)]
    scores = {"train_loss": train_loss, "test_loss": test_loss, "test_accuracy": accuracy}
    return {"updates": task.updates, **scores, "curve": curve}


@torch.no_grad()
def evaluate(model: nn.Module, samples: Tensor, targets: Tensor) -> tuple[float, float]:
    """Returns mean loss and accuracy over a set."""
    loss, correct = 0.0, 0
    for some, wanted in zip(samples.split(256), targets.split(256), strict=True):
        logits, wanted = model(some).flatten(0, -2), wanted.flatten()
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        correct += int((logits.argmax(-1) == wanted).sum())
    return loss / targets.numel(), correct / targets.numel()


def table(results: Results) -> str:
    """Returns means ± standard errors, and differences to float32, as a Markdown table."""
    lines = [
        "| model | state | seeds | training loss | Δ | test loss | Δ | test accuracy | Δ |",
        "|---" * 9 + "|",
    ]
    for model, state_format in dict.fromkeys((model, state_format) for model, state_format, _ in results):
        seeds = finished(results, model, state_format)
        cells = [model, f"`{state_format}`", str(len(seeds))]
        for metric in METRICS:
            values = [
                [results[model, held, seed][metric] for seed in seeds] for held in (state_format, FORMATS[0])
            ]
            cells += compared(*values)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finished(results: Results, model: str, state_format: str) -> list[int]:
    """Returns the seeds of the runs that have ended, with this format and with float32."""
    seeds = [seed for other, held, seed in results if (other, held) == (model, state_format)]
    return sorted(seed for seed in seeds if (model, FORMATS[0], seed) in results)


def draw(results: Results, path: Path) -> None:
    """Draws the learning curves into a PNG file: means over the seeds, and their standard errors."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(model for model, _, _ in results))
    figure = Figure(figsize=(3.6 * len(models), 3.4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for state_format, style in zip(FORMATS, ("-", "--", ":"), strict=True):
            curves = [results[model, state_format, s]["curve"] for s in finished(results, model, state_format)]
            if curves:
                draw_curve(axes, curves, style, state_format)
        axes.set(title=model, xlabel="part of the training", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def draw_curve(axes: Any, curves: Sequence[Sequence[float]], style: str, label: str) -> None:
    """Draws the mean of curves, one for each seed, and a band of its standard error."""
    estimates = [estimate(values) for values in zip(*curves, strict=True)]
    places = [(index + 0.5) / len(estimates) for index in range(len(estimates))]
    means = [found.mean or 0.0 for found in estimates]
    axes.plot(places, means, style, label=label)
    errors = [found.error or 0.0 for found in estimates]
    low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, alpha=0.15)


def read(path: Path, tasks: Mapping[str, Task]) -> Results:
    """Returns the finished runs of a file that have as many updates as the tasks."""
    found: Results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        run = json.loads(line)
        key = run.pop("model"), run.pop("state_format"), run.pop("seed")
        if key[0] in tasks and run["updates"] == tasks[key[0]].updates:
            found[key] = run
    return found


def main() -> None:
    """Makes the runs that are missing, in the order of the seeds, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=10, help="runs of each model and format")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--updates", type=positive, help="updates of each run (default: those of the model)")
    parser.add_argument("--output", type=Path, default=Path("runs/state_formats_quality.jsonl"))
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the result of a run depends on it
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tasks = {model: MODELS[model]() for model in args.models}
    if args.updates is not None:
        tasks = {model: replace(task, updates=args.updates) for model, task in tasks.items()}
    results = read(args.output, tasks)
    wanted = [(model, held, seed) for seed in range(args.seeds) for model in tasks for held in FORMATS]
    for model, state_format, seed in (run for run in wanted if run not in results):
        result = train(tasks[model], state_format, seed)
        results[model, state_format, seed] = result
        with args.output.open("a") as lines:
            lines.write(json.dumps({"model": model, "state_format": state_format, "seed": seed, **result}) + "\n")
    # In the order of the models: runs may have been added for more seeds, or for one model.
    results = {
        run: results[run] for model in tasks for held in FORMATS for run in results if run[:2] == (model, held)
    }
    print(table(results))
    draw(results, args.picture)


if __name__ == "__main__":
    main()
