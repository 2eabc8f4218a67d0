"""Options of the training that have no effect together with the others. Imports no torch.

Options whose effect depends on the number of ranks, such as `--compression`, are not among them: one command runs
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hvd_adam.errors import UserError
from hvd_adam.import_path import is_reference

OWN_MODELS_WITHOUT_BATCHNORM = ("cnn", "mlp")


def reads_files(dataset: str) -> bool:
    """Returns whether a data set is read from `--data-dir`."""
    return dataset not in ("digits", "synthetic")


def reads_in_workers(dataset: str) -> bool:
    """Returns whether worker processes may read a data set."""
    return dataset not in ("digits", "synthetic", "cifar10")


# For each option: whether it has an effect in a configuration, and what it needs for that.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_dir": (lambda c: reads_files(c.dataset), "--dataset cifar10, imagefolder or package.module:function"),
    "image_size": (lambda c: c.dataset == "imagefolder", "--dataset imagefolder"),
    "cache": (lambda c: c.dataset == "imagefolder", "--dataset imagefolder"),
    "max_corrupt": (lambda c: reads_in_workers(c.dataset), "--dataset imagefolder or package.module:function"),
    "workers": (lambda c: reads_in_workers(c.dataset), "--dataset imagefolder or package.module:function"),
    "download": (lambda c: c.dataset == "cifar10", "--dataset cifar10"),
    "synthetic_shape": (lambda c: c.dataset == "synthetic", "--dataset synthetic"),
    "synthetic_classes": (lambda c: c.dataset == "synthetic", "--dataset synthetic"),
    "synthetic_samples": (lambda c: c.dataset == "synthetic", "--dataset synthetic"),
    "model_args": (lambda c: is_reference(c.model), "--model package.module:function"),
    "data_args": (lambda c: is_reference(c.dataset), "--dataset package.module:function"),
    "label_smoothing": (lambda c: c.loss is None, "the default loss, cross-entropy: leave out --loss"),
    "weight_decay_on": (lambda c: c.weight_decay > 0, "--weight-decay above 0"),
    "init_from": (lambda c: c.resume in ("auto", "never"), "a new run: leave out --resume"),
    "dropout": (lambda c: c.model == "cnn", "--model cnn"),
    "sync_batchnorm": (
        lambda c: c.model not in OWN_MODELS_WITHOUT_BATCHNORM,
        "a model with batch normalization, such as --model resnet18",
    ),
    "channels_last": (lambda c: c.model != "mlp", "a model with convolutions, such as --model cnn"),
    "decoupled_weight_decay": (lambda c: c.weight_decay > 0, "--weight-decay above 0"),
    "warmup_epochs": (
        lambda c: c.lr_scaling in ("linear", "sqrt") or c.lr_decay in ("cosine", "linear"),
        "--lr-scaling linear or sqrt, or --lr-decay cosine or linear",
    ),
    "lr_decay_factor": (lambda c: c.lr_decay == "step", "--lr-decay step"),
    "local_steps": (lambda c: c.strategy == "local", "--strategy local"),
    "outer_lr": (lambda c: c.strategy == "local", "--strategy local"),
    "outer_momentum": (lambda c: c.strategy == "local", "--strategy local"),
    "bucket_mib": (lambda c: c.strategy != "local" and c.op == "average", "--strategy allreduce or sharded"),
    "max_skipped": (
        lambda c: not c.release_gradients,
        "updates that can be skipped: leave out --release-gradients",
    ),
    "islands": (lambda c: c.strategy == "local", "--strategy local"),
    "commit_every": (
        lambda c: c.elastic and c.strategy != "local",
        "--elastic and --strategy allreduce or sharded",
    ),
    "noise_scale_form": (lambda c: c.noise_scale is not None, "--noise-scale"),
    "allow_data_change": (lambda c: c.resume != "never", "--resume auto or a checkpoint"),
}


def require_effect(config: Any) -> None:
    """Checks that every option that is not at its default has an effect.

    Args:
        config: a `TrainConfig`.

    Raises:
        UserError: options without an effect; the message names all of them, and what each needs.
    """
    idle = [
        f"{_option(item.name, value)} has no effect without {RULES[item.name][1]}"
        for item in fields(config)
        if item.name in RULES and (value := getattr(config, item.name)) != item.default
        if not RULES[item.name][0](config)
    ]
    if idle:
        raise UserError("; ".join(idle))


def _option(name: str, value: Any) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {value}"
