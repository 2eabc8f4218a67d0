"""Final loss and accuracy of an MLP on the digits by format of Adam's state, over several seeds.

python docs/state_formats_quality.py --seeds 10
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from hvd_adam import Adam

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_format": "bfloat16"},
    "8bit": {"state_format": "8bit"},
}
BATCH, TRAIN_IMAGES = 32, 1437

Data = tuple[torch.Tensor, torch.Tensor]


def digits() -> tuple[Data, Data]:
    """Returns images and labels for training and for testing."""
    found = load_digits()
    images, labels = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    return (images[train], labels[train]), (images[test], labels[test])


def trained(data: Data, seed: int, epochs: int, options: dict[str, Any]) -> torch.nn.Module:
    """Trains a model; weights and batches depend on the seed only."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10))
    optimizer = Adam(model.parameters(), lr=1e-3, implementation="fused", **options)
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def scores(model: torch.nn.Module, train: Data, test: Data) -> tuple[float, float, float]:
    """Returns the loss on the training images, and loss and accuracy on the test images."""
    logits = model(test[0])
    accuracy = (logits.argmax(dim=1) == test[1]).float().mean().item()
    return F.cross_entropy(model(train[0]), train[1]).item(), F.cross_entropy(logits, test[1]).item(), accuracy


def cell(values: list[float]) -> str:
    """Returns mean and standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.4f} ± {error:.4f}"


def main() -> None:
    """Prints a Markdown table; differences are paired by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = digits()
    print(
        "| state | training loss | test loss | test accuracy | training loss − float32's |\n|---|---|---|---|---|"
    )
    first: list[tuple[float, float, float]] = []
    for name, options in FORMATS.items():
        runs = [
            scores(trained(train, seed, arguments.epochs, options), train, test) for seed in range(arguments.seeds)
        ]
        first = first or runs
        difference = [run[0] - other[0] for run, other in zip(runs, first, strict=True)]
        cells = [cell(list(values)) for values in zip(*runs, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {cell(difference) if runs is not first else '–'} |")


if __name__ == "__main__":
    main()
