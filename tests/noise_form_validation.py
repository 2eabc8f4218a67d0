"""Compares both forms of the noise scale with the updates that trainings with other batches needed.

    OMP_NUM_THREADS=1 python tests/advise_validation.py FOLDER train    # updates to the target, with each batch
    OMP_NUM_THREADS=1 python tests/noise_form_validation.py FOLDER      # about 10 minutes on one core

The digits are trained with 64 samples in an update, as in `advise_validation.py`. At some updates tr Σ / |G|² is
computed in float64 from the gradients of all training samples, as they are and divided by Adam's √v̂ + ε.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import advise_validation
import numpy as np
import torch
from advise_validation import FORMS
from torch import Tensor

STEPS = {"cnn": (20, 120), "mlp": (60, 420)}  # updates between two checkpoints, and of the whole training
MEASURED_SEEDS = range(6)
SAMPLES_AT_ONCE = 100


def counted(updates: Mapping[int, float]) -> float:
    """Returns the noise scale in samples whose updates, ∝ 1 + noise scale / batch, fit those counted best.

    Args:
        updates: to the same loss, by batch; infinite ones do not count. Logarithms are fitted by least squares.
    """
    known = {batch: count for batch, count in updates.items() if math.isfinite(count)}
    batches, counts = np.array([*known]), np.log([*known.values()])
    return float(min(np.geomspace(1, 1e4, 4000), key=lambda noise: np.var(counts - np.log1p(noise / batches))))


def noise_scale(squares: list[Tensor], means: list[Tensor], weights: list[Tensor]) -> float:
    """Returns tr Σ / |G|² in samples, of gradients whose squares are multiplied by weights.

    Args:
        squares: for each parameter the mean of the squared gradients of samples.
        means: the mean of their gradients.
        weights: as many elements.
    """
    total, signal = (
        sum(float((weight * value).sum()) for weight, value in zip(weights, values, strict=True))
        for values in (squares, [mean.square() for mean in means])
    )
    return (total - signal) / signal


def exact(trainer: Any, saved: Mapping[str, Any]) -> dict[str, float]:
    """Returns the noise scale of all training samples at a checkpoint, by form."""
    raw, labels = trainer.loader._train
    images, names = trainer.loader._normalize(raw), [name for name, _ in trainer.model.named_parameters()]

    def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        outputs = torch.func.functional_call(trainer.model, params, (image[None],))
        return torch.nn.functional.cross_entropy(outputs, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    params = {name: saved["model"][name] for name in names}
    means = [torch.zeros_like(p, dtype=torch.float64) for p in params.values()]
    squares = [torch.zeros_like(mean) for mean in means]
    for part in zip(images.split(SAMPLES_AT_ONCE), labels.long().split(SAMPLES_AT_ONCE), strict=True):
        for i, gradients in enumerate(each(params, *part).values()):
            means[i] += gradients.double().sum(0) / len(images)
            squares[i] += gradients.double().square().sum(0) / len(images)
    states = [saved["optimizer"]["state"][i] for i in range(len(names))]
    roots = [(state["exp_avg_sq"].double() / (1 - 0.999 ** float(state["step"]))).sqrt() for state in states]
    weights = [torch.where(root > 0, (root + 1e-8) ** -2, 0.0) for root in roots]
    ones = [torch.ones_like(root) for root in roots]
    return {form: noise_scale(squares, means, w) for form, w in zip(FORMS, (ones, weights), strict=True)}


def train(folder: Path, model: str, seed: int, **options: Any) -> tuple[Any, Path]:
    """Trains with 64 samples in an update; returns the trainer and the run folder."""
    from hvd_adam.config import TrainConfig
    from hvd_adam.training.trainer import Trainer

    run = folder / "-".join(["form", model, options.get("noise_scale_form", "exact"), str(seed)])
    values = advise_validation.options(model, 64, seed=seed, epochs=10**4, resume="never") | options
    trainer = Trainer(TrainConfig(**values, output_dir=str(run)))
    trainer.run()
    return trainer, run


def compare(folder: Path, model: str) -> None:
    """Prints the noise scales of a model."""
    every, most = STEPS[model]
    found: dict[str, dict[int, list[float]]] = {form: {} for form in FORMS}
    for seed in advise_validation.SEEDS:
        trainer, run = train(folder, model, seed, max_steps=most, checkpoint_every=every, keep=100)
        for path in sorted((run / "checkpoints").glob("step-*")):
            for form, value in exact(trainer, torch.load(path / "state.pt", weights_only=True)).items():
                found[form].setdefault(int(path.name[5:]), []).append(value)
    target = advise_validation.TARGETS[model]
    updates = {
        batch: median(
            advise_validation.updates_to_target(folder / f"{model}-{batch}-{s}", target)
            for s in advise_validation.SEEDS
        )
        for batch in advise_validation.GRID
    }
    print(f"{model}: updates by batch {updates}; the noise scale that fits them is {counted(updates):.0f}")
    for form, rows in found.items():
        shown = ", ".join(f"{step}: {median(values):.0f}" for step, values in rows.items())
        print(f"{form}, exact, median over the seeds: {shown}; mean {fmean(map(median, rows.values())):.0f}")
        options = {"noise_scale": 1, "noise_scale_form": form, "accumulate": 2, "max_steps": round(updates[64])}
        runs = [train(folder, model, seed, **options)[1] for seed in MEASURED_SEEDS]
        last = [advise_validation.events(run, "noise_scale")[-1]["noise_scale"] for run in runs]
        print(f"{form}, measured at the target: {[value and round(value) for value in last]}", flush=True)


def main() -> None:
    """Compares both models."""
    for model in STEPS:
        compare(Path(sys.argv[1]), model)


if __name__ == "__main__":
    main()
