"""Functions that build the parts of a run from its configuration: data, model, optimizer, schedule."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_adam import data
from hvd_adam.config import DataConfig, TrainConfig
from hvd_adam.data.datasets import is_stream
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.mixup import MixupLoader
from hvd_adam.data.own import checked_datasets
from hvd_adam.data.protocols import Data, Loader
from hvd_adam.data.transforms import transformed
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.random_state import seed_generators
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.distributed.api import distribute
from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.distributed.local.islands import count_islands
from hvd_adam.distributed.local.optimizer import LocalAdam
from hvd_adam.distributed.optimizer import DistributedAdam
from hvd_adam.distributed.placement import cores
from hvd_adam.distributed.sync_batchnorm import convert
from hvd_adam.errors import UserError
from hvd_adam.import_path import is_reference, resolve
from hvd_adam.models import zoo
from hvd_adam.models.precision import parameter_dtype
from hvd_adam.optim.adam import Adam
from hvd_adam.schedule import LearningRateSchedule, Scaled, scale
from hvd_adam.training.objective import Objective
from hvd_adam.training.weights.trainable import freeze, parameter_groups

MOST_WORKERS = 16  # by default: more rarely decode faster than one GPU trains


def load_data(
    config: DataConfig, *, workers: int = 0, progress: Callable[[str], None] = lambda doing: None
) -> data.ImageData | data.Datasets:
    """Loads the data set, or finds its files.

    Args:
        config: its options.
        workers: processes that make the cache of an image folder.
        progress: as for `image_folder.load.load_packed`.

    Raises:
        UserError: no data set has that name, or its files are missing or damaged.
    """
    if config.dataset == "imagefolder":
        from hvd_adam.data.image_folder.load import load, load_packed  # torchvision takes a second to import

        folder, size, positive = Path(config.data_dir), config.image_size, config.positive_class
        if config.cache is None:
            return load(folder, image_size=size, positive_class=positive)
        return load_packed(
            folder,
            Path(config.cache),
            image_size=size,
            positive_class=positive,
            workers=workers,
            max_unreadable=config.max_corrupt,
            progress=progress,
        )
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        args=config.data_args,
        download=config.download,
        positive_class=config.positive_class,
        synthetic_shape=config.synthetic_size(),
        synthetic_classes=config.synthetic_classes,
        synthetic_samples=config.synthetic_samples,
    )


def worker_count(workers: int | None, cluster: Cluster) -> int:
    """Returns the number of worker processes of a rank; by default its share of the cores less one for itself.

    Args:
        workers: of the user; None for the default.
        cluster: this process.
    """
    if workers is not None:
        return workers
    # `init` sets PyTorch's threads to this rank's share of the cores, unless the user has set them.
    is_share = "OMP_NUM_THREADS" not in os.environ
    share = torch.get_num_threads() if is_share else len(cores()) // cluster.local_size
    return min(max(share - 1, 1), MOST_WORKERS)


def make_loader(
    config: TrainConfig, cluster: Cluster, progress: Callable[[str], None] = lambda doing: None
) -> Loader:
    """Builds the loader of batches on this rank's device.

    Args:
        config: the run's configuration.
        cluster: this process.
        progress: as for `load_data`.

    Raises:
        UserError: as `load_data`; the function of --transforms cannot be imported, or fails; --workers or
            --max-corrupt have no effect, because the data set is in memory.
    """
    dtype = parameter_dtype(config.precision)
    transform = None if config.transforms is None else resolve(config.transforms, "--transforms")
    workers = worker_count(config.workers, cluster)
    loaded = load_data(config, workers=workers, progress=progress)
    if isinstance(loaded, data.ImageData):
        require_no_workers(config)
        loader: Loader = DeviceLoader(
            loaded, cluster.device, dtype=dtype, channels_last=config.channels_last, transform=transform
        )
        return loader if config.mixup is None else MixupLoader(loader, loader, config.mixup)
    if transform is not None:
        loaded = checked_datasets(transformed(loaded, transform), f"--transforms {config.transforms}")

    if is_stream(loaded.train):
        _require_stream_options(config)
    unreadable = UnreadableSamples(config.max_corrupt)

    def read() -> Loader:
        return WorkerLoader(
            loaded,
            cluster.device,
            workers=workers,
            dtype=dtype,
            channels_last=config.channels_last,
            unreadable=unreadable,
            # A loss of the user's own may give other numbers a meaning, such as -1 to samples without a label.
            checks_training_labels=config.loss is None or config.mixup is not None,
        )

    return read() if config.mixup is None else MixupLoader(read(), read(), config.mixup)


def _require_stream_options(config: TrainConfig) -> None:
    """Raises UserError for options that an iterable training set cannot follow."""
    what = f"{config.dataset} returns an iterable training set"
    if config.mixup is not None:
        raise UserError(f"--mixup: {what}, which has no second order: return a map-style one")
    if config.workers is not None and config.workers > 1:
        raise UserError(f"--workers {config.workers}: {what}, which one process reads: use --workers 1 or 0")
    if config.max_corrupt != TrainConfig.max_corrupt:
        raise UserError(f"--max-corrupt: no effect, because {what}; leave it out, and let the set skip samples")


def require_no_workers(config: DataConfig) -> None:
    """Raises UserError if options for worker processes are given for a function that returned `ImageData`."""
    given = {"workers": config.workers is not None, "max-corrupt": config.max_corrupt != DataConfig.max_corrupt}
    idle = " and ".join(f"--{name}" for name, is_given in given.items() if is_given)
    if idle and is_reference(config.dataset):
        raise UserError(f"{idle}: no effect, because {config.dataset} returns images in memory; leave it out")


def build_model(config: TrainConfig, loader: Loader) -> torch.nn.Module:
    """Builds the model with its initial weights, with the device and dtype of the loader's inputs.

    Raises:
        UserError: no model has that name, it does not fit the data, --sync-batchnorm cannot synchronize it, or
            --freeze does not fit it.
    """
    seed_generators(config.seed)
    model = model_of(asdict(config), loader.data)
    if config.sync_batchnorm:
        try:
            convert(model, strict=True)
        except UserError as error:
            raise UserError(f"--sync-batchnorm: {error}") from None
        if not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
            raise UserError(f"--sync-batchnorm has no effect: {config.model} has no batch normalization")
    if config.freeze is not None:
        freeze(model, config.freeze)
    model.to(loader.device, loader.dtype)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return model


def model_of(config: Mapping[str, Any], samples: Data) -> torch.nn.Module:
    """Builds the model of a configuration, on the CPU.

    Args:
        config: as for `models.zoo.of_config`.
        samples: the data.

    Raises:
        UserError: as `models.zoo.build`.
    """
    has_logits = config.get("loss") is None and isinstance(samples, data.ImageData)
    return zoo.of_config(config, samples.sample_shape, len(samples.classes), try_out=has_logits)


def try_out(objective: Objective, config: TrainConfig, model: torch.nn.Module, loader: Loader) -> None:
    """Checks that functions of the user's own fit each other and the data, on two test samples.

    Raises:
        UserError: they do not.
    """
    names = (config.model, config.dataset, config.loss or "", config.metrics or "", config.transforms or "")
    if config.mixup is None and not any(map(is_reference, names)):
        return
    test = next(iter(loader.test_batches(2)), None)
    if test is None:
        return  # no sample can be read, which the evaluation reports
    train = test
    if isinstance(loader, MixupLoader):
        train = loader.mix(test, test, torch.full((len(test[0]),), 0.5))
    if config.transforms is not None:
        next(iter(loader.train_batches(config.seed, 0, global_batch_size=1)))
    objective.try_out(model, config.model, train, test, len(loader.data.classes))


def scale_for_ranks(config: TrainConfig, cluster: Cluster) -> Scaled:
    """Scales Adam's hyper-parameters for the number of ranks and micro-batches.

    With --strategy local, "linear" and "sqrt" multiply learning rate and ε by √islands, too. The gradients of an
    island vary √islands times as much as the mean over all ranks, so Adam, which divides by √v, moves the islands
    by as much less. With √islands their mean moves as averaged gradients would, where gradients are mostly noise
    (the assumption of the square root rule; Malladi et al., arXiv 2205.10287; the factor is derived from it in
    docs/local_steps.md).

    Raises:
        UserError: a scaled value is out of range; the ranks cannot be grouped in --islands.
    """
    ranks = cluster.size
    if config.op == "adasum":
        # Adasum keeps the scale of one rank's step; on GPUs with NCCL it averages within a host first
        # (Horovod's documentation, "AdaSum with Horovod", on learning rates).
        ranks = cluster.local_size if cluster.device.type == "cuda" and horovod().nccl_built() else 1
    scaled = scale(ranks * config.accumulate, config.lr_scaling, lr=config.lr, betas=config.betas, eps=config.eps)
    islands = count_islands(config.islands, cluster)
    if config.strategy == "local" and config.lr_scaling in ("linear", "sqrt"):
        root = math.sqrt(islands)
        return scaled._replace(lr=scaled.lr * root, eps=scaled.eps * root)
    return scaled


def make_adam(config: TrainConfig, model: torch.nn.Module, scaled: Scaled) -> Adam:
    """Builds this rank's optimizer, before `distribute`."""
    return Adam(
        parameter_groups(model, config.weight_decay_on),
        lr=scaled.lr,
        betas=scaled.betas,
        eps=scaled.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        decoupled_weight_decay=config.decoupled_weight_decay,
        state_format=config.state_format,
        implementation=config.implementation,
    )


def distributed(
    config: TrainConfig,
    adam: Adam,
    model: torch.nn.Module,
    accumulate: int,
    cluster: Cluster,
    scaler: Any | None,
) -> DistributedAdam | LocalAdam:
    """Distributes this rank's optimizer with the options of a configuration.

    Args:
        config: the run's configuration.
        adam: the optimizer.
        model: the model.
        accumulate: micro-batches per rank and update.
        cluster: this process.
        scaler: the loss scaler of "fp16", else None.
    """
    several = cluster.size * accumulate > 1  # in an elastic run, one may be left
    same = "local_steps islands outer_lr outer_momentum compression bucket_mib op max_grad_norm release_gradients"
    return distribute(
        adam,
        model,
        strategy=config.strategy,
        accumulate=accumulate,
        loss_scaler=scaler,
        # Nothing here looks at gradients.
        defer_averaging=config.strategy != "local" and not config.release_gradients,
        skip_nonfinite=not config.release_gradients,
        noise_scale=config.noise_scale if several else None,
        noise_scale_form=config.noise_scale_form if several else "gradient",
        **{name: getattr(config, name) for name in same.split()},
    )


def make_schedule(
    config: TrainConfig, peak: float, steps_per_epoch: int, total_steps: int
) -> LearningRateSchedule:
    """Builds the learning-rate schedule: from --lr to `peak`, then the decay.

    Args:
        config: the run's configuration.
        peak: the learning rate after the warm-up.
        steps_per_epoch: updates per epoch.
        total_steps: updates in the whole run.
    """
    return LearningRateSchedule(
        initial=config.lr,
        peak=peak,
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        total_steps=total_steps,
        decay=config.lr_decay,
        milestones=tuple(epoch * steps_per_epoch for epoch in config.milestones()),
        factor=config.lr_decay_factor,
    )
