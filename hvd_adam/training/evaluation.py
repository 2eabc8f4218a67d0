"""`python -m hvd_adam.evaluate`: the scores of a checkpoint; and loading of models from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.config import DataConfig, EvaluateConfig
from hvd_adam.config.effects import reads_files
from hvd_adam.data import Datasets, ImageData
from hvd_adam.data.datasets import UnreadableSample, first_sample
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.protocols import Data, Loader
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.random_state import preserved
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.distributed.agreement import raise_on_all_ranks, require_same
from hvd_adam.distributed.context import Cluster, init
from hvd_adam.errors import UserError
from hvd_adam.import_path import failure, is_reference
from hvd_adam.inference.one_by_one import one_by_one
from hvd_adam.inference.predictions import Predictions
from hvd_adam.inference.trained import Trained
from hvd_adam.log import write_result
from hvd_adam.models.precision import autocast, parameter_dtype
from hvd_adam.text import described
from hvd_adam.training.builders import load_data, model_of, worker_count
from hvd_adam.training.objective import Objective
from hvd_adam.training.outputs import require_outputs
from hvd_adam.training.scores import plots, tables
from hvd_adam.training.scores.scoring import Forward, Scores, score


def evaluate(config: EvaluateConfig) -> None:
    """Runs `python -m hvd_adam.evaluate` on this rank."""
    cluster = init(config.device)
    require_same(cluster, "arguments", asdict(config))
    with raise_on_all_ranks(cluster):
        if cluster.rank == 0:
            outputs = {"--plot": config.plot, "--predictions": config.predictions}
            require_outputs(outputs, replace=config.force)
        trained = Trained.of_options(config)
        forward, loader, objective = load_model(config, trained, cluster)
        log = None if config.predictions is None else Predictions(Path(config.predictions), cluster, loader)
    checkpoint = trained.path
    if log is None:
        scores = score(forward, loader, cluster, objective, config.batch_size)
    else:  # as hvd_adam.predict does, to the last bit
        parallel = trained.parallel and cluster.device.type == "cpu"
        alone, record = partial(one_by_one, forward, parallel=parallel), partial(log.add, dtype=objective.dtype)
        scores = score(alone, loader, cluster, objective, config.batch_size, record=record)
        log.write()
    if cluster.rank == 0:
        text = (
            tables.as_json(scores, loader.data, checkpoint)
            if config.json
            else tables.as_text(scores, loader.data, checkpoint, config.per_class)
        )
        write_result(text + "\n")
        if config.predictions is not None and not config.json:
            write_result(f"predictions {config.predictions}\n")
    if config.plot is not None:
        with raise_on_all_ranks(cluster):
            if cluster.rank == 0:
                _plot(Path(config.plot), scores, loader.data, checkpoint)
                if not config.json:
                    write_result(f"plot {config.plot}\n")


def _plot(path: Path, scores: Scores, data: Data, checkpoint: Path) -> None:
    """Draws the scores; the picture is an addition to the text, which has been printed."""
    if scores.counts is None or scores.calibration is None:
        raise UserError(f"--plot {path}: there is nothing to draw: outputs are not logits of the classes")
    with whole_file("--plot", path) as draft:
        plots.plot(draft, scores.counts, scores.calibration, data.classes, f"{data.name}: {checkpoint}")


def load_model(config: EvaluateConfig, trained: Trained, cluster: Cluster) -> tuple[Forward, Loader, Objective]:
    """Builds a checkpoint's model, and loads the test samples with the normalization of the training.

    Returns:
        The forward pass of the model in evaluation mode, the loader, and loss and metrics.

    Raises:
        UserError: model, data set or functions cannot be built, or they do not fit together.
    """
    options = trained.config
    # Test images are the same with and without a cache, which this host may not have.
    data_config = replace(_data_config(config, options), cache=None)
    samples = load_data(data_config)
    if config.max_corrupt is not None and isinstance(samples, ImageData):
        raise UserError(
            f"--max-corrupt {config.max_corrupt} has no effect: the images of {samples.name} are in memory; "
            "leave the option out"
        )
    _require_same_classes(trained, samples)
    if config.dataset is not None and is_reference(config.dataset) and not is_reference(options["dataset"]):
        _require_uint8(trained, samples, config.dataset)  # the inputs of the training were uint8 for certain
    samples = _normalized(trained, samples)
    model = model_of(options, samples)
    dtype = parameter_dtype(options["precision"])
    model.to(cluster.device, dtype).eval()

    def forward(batch: torch.Tensor) -> Any:
        try:
            with autocast(options["precision"], cluster.device):
                return model(batch)
        except Exception as error:
            given = f"inputs of shape {tuple(batch.shape)}"
            raise UserError(
                f"the model of checkpoint {trained.path} fails with {given}: {failure(error)}"
            ) from error

    loader: Loader
    if isinstance(samples, ImageData):
        loader = DeviceLoader(samples, cluster.device, dtype=dtype)
    else:
        # As in the training: a data set that cannot be sent to worker processes needs 0.
        workers = worker_count(options.get("workers"), cluster)
        unreadable = UnreadableSamples(data_config.max_corrupt)
        loader = WorkerLoader(samples, cluster.device, workers=workers, dtype=dtype, unreadable=unreadable)
    if any(map(is_lazy, model.parameters())):  # their shapes depend on the inputs
        forward(next(loader.test_batches(1))[0])
    trained.load_into(model)
    return forward, loader, Objective.of(options, dtype)


def _require_same_classes(trained: Trained, samples: Data) -> None:
    pairs = enumerate(zip_longest(trained.classes, samples.classes))
    other = next((place for place, (saved, own) in pairs if saved != own), None)
    if other is not None:
        saved, own = described(trained.classes), described(samples.classes)
        raise UserError(
            f"checkpoint {trained.path} is of another model or data set: its classes are not those of "
            f"{samples.name} from number {other} on: {saved}, not {own}"
        )


def _require_uint8(trained: Trained, samples: ImageData | Datasets, dataset: str) -> None:
    """Checks that the test samples of a function of one's own are normalized as the training's images were.

    Raises:
        UserError: they are not uint8, so the statistics of the checkpoint would have no effect.
    """
    if trained.statistics is None or isinstance(samples, ImageData):
        return
    with suppress(UnreadableSample), preserved():  # an unreadable sample is counted when it is read
        dtype = str(first_sample(samples.test)[0].dtype).removeprefix("torch.")
        if dtype != "uint8":
            raise UserError(
                f"{dataset}: test[0] has an input of dtype {dtype}, but checkpoint {trained.path} was trained on "
                "uint8 images, which alone are normalized: return uint8 images, 0 to 255"
            )


def _normalized(trained: Trained, samples: ImageData | Datasets) -> ImageData | Datasets:
    """Returns the samples with the normalization of the training, whatever their own is.

    Raises:
        UserError: there was none, but the samples have one.
    """
    mean, std = trained.statistics or (None, None)
    if mean is None and (isinstance(samples, ImageData) or None not in (samples.mean, samples.std)):
        raise UserError(
            f"checkpoint {trained.path} is of a training without normalization, which {samples.name} has: "
            "evaluate it on Datasets without mean and std"
        )
    return samples if (samples.mean, samples.std) == (mean, std) else replace(samples, mean=mean, std=std)


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
    given = {name: getattr(config, name) for name in ("dataset", "data_dir", "max_corrupt")}
    return DataConfig(**values | {name: value for name, value in given.items() if value is not None})
