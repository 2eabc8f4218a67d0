"""Measures how compressed gradients change the result of a training: the table of docs/compression_quality.md.

    horovodrun -np 2 python docs/compression_quality.py [--seeds 10]

Trains small models with each format, with and without error feedback. A seed decides the initial weights and the
batches, which are the same in all rows. Each finished run is a line of JSON in --output, and is not repeated.
Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.checkpoint.files import write_atomically
from hvd_adam.compare.statistics import estimate
from hvd_adam.data.digits import load
from hvd_adam.models.zoo import build
from hvd_adam.schedule import LearningRateSchedule, learning_rate

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2  # of the transformer
TEXT = Path(__file__).parents[1] / "LICENSE"
METRICS = ("train_loss", "test_loss", "test_accuracy")

Results = dict["Run", dict[str, float]]


class Transformer(nn.Module):
    """Predicts each next character: tokens (n, length ≤ CONTEXT) to logits (n, length, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits of the characters that follow each of `tokens`."""
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], tokens.device)
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.blocks(hidden, causal, is_causal=True))
        return logits


@dataclass(frozen=True)
class Task:
    """What is trained, with samples (n, …) and targets (n,) or (n, length) of two sets."""

    model: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    updates: int
    lr: float
    batch_size: int = 32  # samples per update, of all ranks together
    max_grad_norm: float | None = None


def digits(name: str, updates: int, lr: float) -> Task:
    """Returns a classifier of `load_digits`: 1,440 training and 357 test images of 8×8."""
    data = load()

    def tensors(images: object, labels: object) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(images).float() / 255 - 0.3, torch.as_tensor(labels).long()

    shape, classes = data.sample_shape, len(data.classes)
    return Task(
        lambda: build(name, sample_shape=shape, num_classes=classes),
        tensors(data.train_images, data.train_labels),
        tensors(data.test_images, data.test_labels),
        updates,
        lr,
    )


def text(updates: int, lr: float) -> Task:
    """Returns a language model of the license's characters, of which the last eighth is for validation."""
    characters = TEXT.read_text()
    known = sorted(set(characters))
    data = torch.tensor([known.index(character) for character in characters])
    train, test = data[: len(data) * 7 // 8], data[len(data) * 7 // 8 :]
    samples = [(window[:, :-1], window[:, 1:]) for window in (p.unfold(0, CONTEXT + 1, 8) for p in (train, test))]
    return Task(lambda: Transformer(len(known)), *samples, updates, lr, batch_size=16, max_grad_norm=1.0)


TASKS: dict[str, Callable[[], Task]] = {
    "cnn": lambda: digits("cnn", updates=300, lr=1e-3),
    "mlp": lambda: digits("mlp", updates=400, lr=1e-2),
    "transformer": lambda: text(updates=200, lr=3e-3),
}


@dataclass(frozen=True)
class Row:
    """How gradients are sent."""

    compression: str
    feedback: bool = True
    strategy: str = "allreduce"

    def __str__(self) -> str:
        sharded = ", sharded" if self.strategy == "sharded" else ""
        return f"`{self.compression}`{sharded}{'' if self.feedback else ', no feedback'}"


ROWS = [
    Row("none"),
    *(Row(compression, feedback) for compression in ("int8", "int4") for feedback in (True, False)),
]
SHARDED = [Row("int4", feedback, "sharded") for feedback in (True, False)]  # of the cnn alone


@dataclass(frozen=True)
class Run:
    """One training."""

    model: str
    row: Row
    updates: int
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.model}, {self.row}, seed {self.seed}:"


def train(cluster: Cluster, run: Run, task: Task) -> dict[str, float]:
    """Trains, and returns the losses and the accuracy of both sets, the same on all ranks."""
    torch.manual_seed(run.seed)
    model = task.model().to(cluster.device)
    adam = Adam(model.parameters(), lr=task.lr)
    row, clip = run.row, task.max_grad_norm
    optimizer = distribute(adam, model, strategy=row.strategy, compression=row.compression, max_grad_norm=clip)
    schedule = LearningRateSchedule(task.lr, run.updates, warmup_steps=run.updates / 10, decay="cosine")
    samples, targets = (tensor.to(cluster.device) for tensor in task.train)
    for step, batch in zip(range(run.updates), batches(len(samples), task.batch_size, run.seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        own = batch[cluster.rank :: cluster.size].to(cluster.device)
        optimizer.zero_grad()
        F.cross_entropy(model(samples[own]).flatten(0, -2), targets[own].flatten()).backward()
        optimizer.step()
        if not row.feedback:
            optimizer.error_feedback.load_state_dict(None)  # drops what the codes have missed
    model.eval()
    (train_loss, _), (test_loss, accuracy) = (evaluate(cluster, model, *data) for data in (task.train, task.test))
    return {"train_loss": train_loss, "test_loss": test_loss, "test_accuracy": accuracy}


def batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields the samples of each update, of all ranks together: whole batches of epochs in new orders."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(samples, generator=generator).split(batch_size)[: samples // batch_size]


@torch.no_grad()
def evaluate(cluster: Cluster, model: nn.Module, samples: Tensor, targets: Tensor) -> tuple[float, float]:
    """Returns mean loss and accuracy over a set, of which each rank takes its share."""
    loss, correct = 0.0, 0
    own = slice(cluster.rank, None, cluster.size)
    for some, wanted in zip(samples[own].split(256), targets[own].split(256), strict=True):
        logits = model(some.to(cluster.device)).flatten(0, -2)
        wanted = wanted.to(cluster.device).flatten()
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        correct += int((logits.argmax(-1) == wanted).sum())
    total, hits = cluster.sum([loss, correct])
    return total / targets.numel(), hits / targets.numel()


def table(results: Results, runs: Sequence[Run]) -> str:
    """Returns means ± standard errors, and differences to `none`, as a Markdown table of the finished runs."""
    lines = [
        "| model | gradients | seeds | training loss | Δ | test loss | Δ | test accuracy | Δ |",
        "|---" * 9 + "|",
    ]
    for model, row in dict.fromkeys((run.model, run.row) for run in runs if run in results):
        of_row = [run for run in runs if (run.model, run.row) == (model, row) and run in results]
        of_none = [replace(run, row=ROWS[0]) for run in of_row]
        cells = [model, str(row), str(len(of_row))]
        for metric in METRICS:
            cells += compared(*([results[run][metric] for run in some] for some in (of_row, of_none)))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(values: Sequence[float], baseline: Sequence[float]) -> list[str]:
    """Returns mean ± standard error, and the difference in standard errors of `none` and of the difference.

    Args:
        values: one for each seed.
        baseline: of `none`, with the same seeds.
    """
    of_row, of_none = estimate(values), estimate(baseline)
    of_difference = estimate([value - other for value, other in zip(values, baseline, strict=True)])
    shown = f"{of_row.mean:.4f}" + (f" ± {of_row.error:.4f}" if of_row.error is not None else "")
    if not of_none.error or not of_difference.error:
        return [shown, ""]
    difference = of_difference.mean or 0.0
    return [shown, f"{difference / of_none.error:+.1f}, {difference / of_difference.error:+.1f}"]


def read(path: Path) -> Results:
    """Returns the finished runs of a file of `write`."""
    found: Results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        values = {metric: entry.pop(metric) for metric in METRICS}
        found[Run(row=Row(**entry.pop("row")), **entry)] = values
    return found


def write(path: Path, results: Results) -> None:
    """Writes one line of JSON for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps({**asdict(run), **results[run]}) + "\n" for run in results))


def positive(text: str) -> int:
    """Returns a whole number ≥ 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 1")
    return int(text)


def main() -> None:
    """Makes the runs that are missing, in the order of the seeds, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive, default=10, help="runs of each row")
    parser.add_argument("--models", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--updates", type=positive, help="updates of each run (default: those of the model)")
    parser.add_argument("--output", type=Path, default=Path("runs/compression_quality.jsonl"))
    args = parser.parse_args()
    cluster = init()
    with guard(cluster):
        torch.set_num_threads(1)  # the result of a run depends on it
        tasks = {name: TASKS[name]() for name in args.models}
        runs = [
            Run(name, row, args.updates or task.updates, task.lr, seed)
            for seed in range(args.seeds)
            for name, task in tasks.items()
            for row in (*ROWS, *(SHARDED if name == "cnn" else ()))
        ]
        results = read(args.output) if cluster.is_root else {}
        finished = cluster.gather([run in results for run in runs])[0]
        for run in (run for run, there in zip(runs, finished, strict=True) if not there):
            start = time.perf_counter()
            results[run] = train(cluster, run, tasks[run.model])
            cluster.print(run, results[run], f"{time.perf_counter() - start:.1f} s")
            if cluster.is_root:
                write(args.output, results)
        if cluster.is_root:
            print(table(results, runs))


if __name__ == "__main__":
    main()
