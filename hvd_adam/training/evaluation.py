"""Evaluation of a model on the whole test set, and loading of models from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from hvd_adam.config import DataConfig, EvaluateConfig
from hvd_adam.config.effects import reads_files
from hvd_adam.data import ImageData
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.protocols import Loader
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import Cluster, init
from hvd_adam.errors import CollectiveError, UserError
from hvd_adam.inference.one_by_one import one_by_one
from hvd_adam.inference.predictions import Predictions
from hvd_adam.inference.trained import Trained
from hvd_adam.log import write_result
from hvd_adam.models.precision import autocast, parameter_dtype
from hvd_adam.training.builders import load_data, model_of, worker_count
from hvd_adam.training.objective import Objective

Forward = Callable[[torch.Tensor], Any]

# The largest number of classes with a confusion matrix: more are neither readable nor small in `metrics.jsonl`.
CONFUSION_CLASSES = 50


@dataclass(frozen=True)
class Scores:
    """Averages over the whole test set.

    Attributes:
        test_loss: mean loss; cross-entropy in nats without a loss of the user's own.
        test_accuracy: fraction of samples classified correctly, in [0, 1]; None unless outputs are floating-point
            of shape (samples, classes), and targets int64 labels of shape (samples,).
        test_balanced_accuracy: mean over the classes of their accuracy, in [0, 1]; None where the accuracy is.
        images: number of samples evaluated.
        confusion: number of samples by true class (rows) and predicted class (columns); None with more than
            `CONFUSION_CLASSES` classes, or where the accuracy is.
        metrics: means of the user's own metrics by name.
    """

    test_loss: float
    test_accuracy: float | None
    test_balanced_accuracy: float | None
    images: int
    confusion: list[list[int]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the scores by name; a metric's name is preceded by "test_"."""
        values = asdict(self)
        metrics = values.pop("metrics")
        return values | {f"test_{name}": value for name, value in metrics.items()}


def score(
    forward: Forward,
    loader: Loader,
    cluster: Cluster,
    objective: Objective,
    batch_size: int = 256,
    record: Callable[[Any, torch.Tensor], None] | None = None,
) -> Scores:
    """Evaluates every test sample exactly once over all ranks; every rank must call it.

    Args:
        forward: maps inputs to outputs. The caller sets the model to evaluation mode.
        loader: this rank's batches.
        cluster: this process.
        objective: loss and metrics.
        batch_size: samples per rank and batch.
        record: called with outputs and targets of each batch.

    Returns:
        The scores, identical on all ranks.

    Raises:
        UserError: a metric fails; raised on every rank.
    """
    classes, names = len(loader.data.classes), list(objective.metrics)
    cells = classes**2 if classes <= CONFUSION_CLASSES else 0
    parts = [1, 1, len(names), classes, classes, cells]
    sums = torch.zeros(sum(parts), dtype=torch.float64, device=cluster.device)
    loss, samples, metrics, correct, seen, pairs = torch.split(sums, parts)
    with raise_on_all_ranks(cluster), torch.inference_mode():
        for inputs, targets in loader.test_batches(batch_size, rank=cluster.rank, size=cluster.size):
            outputs = forward(inputs)
            if record is not None:
                record(outputs, targets)
            loss += objective.test_loss(outputs, targets)
            samples += len(inputs)
            metrics += objective.metric_sums(outputs, targets)
            if not _are_logits(outputs, targets, classes):
                continue
            predicted = outputs.argmax(dim=1)
            correct += torch.bincount(targets[predicted == targets], minlength=classes)
            seen += torch.bincount(targets, minlength=classes)
            if cells:
                pairs += torch.bincount(classes * targets + predicted, minlength=cells)
    values = cluster.sum(sums).cpu()
    loss, samples, metrics, correct, seen, pairs = torch.split(values, parts)
    count = int(samples)
    if not count:
        raise CollectiveError("no test sample can be read: the warnings above name them")
    means = dict(zip(names, (metrics / count).tolist(), strict=True))
    if not classes or int(seen.sum()) < count:  # not all outputs were logits
        return Scores(loss.item() / count, None, None, count, None, means)
    recalls = (correct / seen)[seen > 0]
    confusion = pairs.view(classes, classes).int().tolist() if cells else None
    balanced_accuracy = sum(recalls.tolist()) / len(recalls)
    return Scores(loss.item() / count, correct.sum().item() / count, balanced_accuracy, count, confusion, means)


def _are_logits(outputs: Any, targets: torch.Tensor, classes: int) -> bool:
    return (
        isinstance(outputs, torch.Tensor)
        and outputs.is_floating_point()
        and outputs.shape == (len(targets), classes)
        and targets.ndim == 1
        and targets.dtype == torch.int64
    )


def evaluate(config: EvaluateConfig) -> None:
    """Runs `python -m hvd_adam.evaluate` on this rank."""
    cluster = init(config.device)
    require_same(cluster, "arguments", asdict(config))
    with raise_on_all_ranks(cluster):
        trained = Trained.of_options(config)
        forward, loader, objective = load_model(config, trained, cluster)
        log = None if config.predictions is None else Predictions(Path(config.predictions), cluster, loader)
    if log is None:
        scores = score(forward, loader, cluster, objective, config.batch_size)
    else:  # as hvd_adam.predict does, to the last bit
        parallel = trained.parallel and cluster.device.type == "cpu"
        alone, record = partial(one_by_one, forward, parallel=parallel), partial(log.add, dtype=objective.dtype)
        scores = score(alone, loader, cluster, objective, config.batch_size, record)
        log.write()
    if cluster.rank == 0:
        write_result(_report(scores, loader.data.name, trained.path, config.json) + "\n")


def load_model(config: EvaluateConfig, trained: Trained, cluster: Cluster) -> tuple[Forward, Loader, Objective]:
    """Builds a checkpoint's model, and loads the test samples with the normalization of the training.

    Returns:
        The forward pass of the model in evaluation mode, the loader, and loss and metrics.

    Raises:
        UserError: model, data set or functions cannot be built, or they do not fit together.
    """
    options, data = trained.config, trained.data
    # Test images are the same with and without a cache, which this host may not have.
    samples = load_data(replace(_data_config(config, options), cache=None))
    if list(samples.classes) != data["classes"]:
        raise UserError(
            f"checkpoint {trained.path} is of another model or data set: its classes are {data['classes']}, "
            f"those of {samples.name} {list(samples.classes)}"
        )
    model = model_of(options, samples)
    dtype = parameter_dtype(options["precision"])
    model.to(cluster.device, dtype).eval()

    def forward(batch: torch.Tensor) -> Any:
        with autocast(options["precision"], cluster.device):
            return model(batch)

    loader: Loader
    if isinstance(samples, ImageData):
        mean, std = tuple(data["mean"]), tuple(data["std"])
        loader = DeviceLoader(samples, cluster.device, dtype=dtype, mean=mean, std=std)
    else:
        workers = worker_count(None, cluster)
        unreadable = UnreadableSamples(options.get("max_corrupt", DataConfig.max_corrupt))
        loader = WorkerLoader(samples, cluster.device, workers=workers, dtype=dtype, unreadable=unreadable)
    if any(map(is_lazy, model.parameters())):  # their shapes depend on the inputs
        forward(next(loader.test_batches(1))[0])
    trained.load_into(model)
    return forward, loader, Objective.of(options, dtype)


def _data_config(config: EvaluateConfig, trained: Mapping[str, Any]) -> DataConfig:
    """Returns the training's data options, with those that are given for the evaluation replaced."""
    dataset = config.dataset or trained["dataset"]
    if config.data_dir is not None and not reads_files(dataset):
        raise UserError(
            f"--data-dir {config.data_dir} has no effect: {dataset} is not read from files; leave the option out"
        )
    values = {item.name: trained.get(item.name, item.default) for item in fields(DataConfig)}
    if dataset != trained["dataset"]:
        values["data_args"] = None  # they are for the other function
    given = {"dataset": config.dataset, "data_dir": config.data_dir}
    return DataConfig(**values | {name: value for name, value in given.items() if value is not None})


def _report(scores: Scores, name: str, checkpoint: Path, as_json: bool) -> str:
    """Returns the scores of a checkpoint on data set `name` as JSON or as lines of text."""
    values = scores.as_dict()
    if as_json:
        return json.dumps({**values, "checkpoint": str(checkpoint)})
    lines = [f"checkpoint {checkpoint}", f"test samples {scores.images} of {name}"]
    shown = {key: value for key, value in values.items() if key.startswith("test_") and value is not None}
    return "\n".join([*lines, *(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown.items())])
