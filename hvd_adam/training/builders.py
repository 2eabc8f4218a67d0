"""Functions that build the parts of a run from its configuration: data, model, optimizer, schedule."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_adam import data
from hvd_adam.config import DataConfig, TrainConfig
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.distributed.sync_batchnorm import convert
from hvd_adam.errors import UserError
from hvd_adam.models import zoo
from hvd_adam.optim.adam import Adam
from hvd_adam.schedule import LearningRateSchedule, Scaled, scale
from hvd_adam.training.precision import parameter_dtype


def load_images(config: DataConfig) -> data.ImageData:
    """Loads the data set.

    Raises:
        UserError: no data set has that name, or its files are missing or damaged.
    """
    return data.load(
        config.dataset,
        data_dir=config.data_dir,
        download=config.download,
        positive_class=config.positive_class,
        synthetic_shape=config.synthetic_size(),
        synthetic_classes=config.synthetic_classes,
        synthetic_samples=config.synthetic_samples,
    )


def make_loader(config: TrainConfig, cluster: Cluster) -> DeviceLoader:
    """Builds the loader of batches on this rank's device.

    Raises:
        UserError: as `load_images`.
    """
    dtype = parameter_dtype(config.precision)
    return DeviceLoader(load_images(config), cluster.device, dtype=dtype, channels_last=config.channels_last)


def build_model(config: TrainConfig, loader: DeviceLoader) -> torch.nn.Module:
    """Builds the model with its initial weights, with the device and dtype of the loader's images.

    Raises:
        UserError: no model has that name, it does not fit the images, or --sync-batchnorm cannot synchronize it.
    """
    torch.manual_seed(config.seed)
    model: torch.nn.Module = zoo.build(
        config.model,
        in_channels=loader.data.channels,
        num_classes=len(loader.data.classes),
        image_size=loader.data.image_size,
        dropout=config.dropout,
    )
    if config.sync_batchnorm:
        try:
            convert(model, strict=True)
        except UserError as error:
            raise UserError(f"--sync-batchnorm: {error}") from None
        if not any(isinstance(layer, _BatchNorm) for layer in model.modules()):
            raise UserError(f"--sync-batchnorm has no effect: {config.model} has no batch normalization")
    model.to(loader.device, loader.dtype)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return model


def scale_for_ranks(config: TrainConfig, cluster: Cluster) -> Scaled:
    """Scales Adam's hyper-parameters for the number of ranks and micro-batches.

    Raises:
        UserError: a scaled value is out of range.
    """
    ranks = cluster.size
    if config.op == "adasum":
        # Adasum keeps the scale of one rank's step; on GPUs with NCCL it averages within a host first
        # (Horovod's documentation, "AdaSum with Horovod", on learning rates).
        ranks = cluster.local_size if cluster.device.type == "cuda" and horovod().nccl_built() else 1
    return scale(ranks * config.accumulate, config.lr_scaling, lr=config.lr, betas=config.betas, eps=config.eps)


def make_adam(config: TrainConfig, model: torch.nn.Module, scaled: Scaled) -> Adam:
    """Builds this rank's optimizer, before `distribute`."""
    return Adam(
        model.parameters(),
        lr=scaled.lr,
        betas=scaled.betas,
        eps=scaled.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        decoupled_weight_decay=config.decoupled_weight_decay,
        implementation=config.implementation,
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
