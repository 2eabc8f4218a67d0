"""Data sets by name, as numpy arrays, and samplers for training loops of one's own.

Imports no torch: what needs it is imported on first use. `hvd_adam.data.loader` makes batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from hvd_adam.data import cifar10, digits, synthetic
from hvd_adam.data.datasets import Datasets, UnreadableSample
from hvd_adam.data.images import ImageData, one_against_rest
from hvd_adam.errors import UserError
from hvd_adam.import_path import accepts, call, is_reference, unknown

if TYPE_CHECKING:
    from hvd_adam.data.samplers.distributed_sampler import StatefulDistributedSampler
    from hvd_adam.data.samplers.iterable import equal_steps, shard
    from hvd_adam.data.sampling import evaluation_share

__all__ = [
    "DATASETS",
    "Datasets",
    "ImageData",
    "StatefulDistributedSampler",
    "UnreadableSample",
    "equal_steps",
    "evaluation_share",
    "load",
    "shard",
]

DATA_DIR = "data"  # the default folder of data sets
DATASETS = ("digits", "cifar10", "synthetic")

_MODULES = {
    "StatefulDistributedSampler": "samplers.distributed_sampler",
    "equal_steps": "samplers.iterable",
    "evaluation_share": "sampling",
    "shard": "samplers.iterable",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def load(
    name: str,
    *,
    data_dir: str | Path = DATA_DIR,
    args: Mapping[str, object] | None = None,
    download: bool = True,
    positive_class: str | None = None,
    synthetic_shape: tuple[int, int, int] = (3, 32, 32),
    synthetic_classes: int = 10,
    synthetic_samples: int = 4096,
) -> ImageData | Datasets:
    """Returns a data set.

    Args:
        name: one of `DATASETS`, or `package.module:function`. The function is called with the keyword `data_dir`
            (a path) if it has it, and with `args`. It returns `ImageData`, `Datasets`, or another object with the
            attributes of the latter.
        data_dir: folder of the data set.
        args: further keyword arguments of the function.
        download: whether to download cifar10 into `data_dir` if it is missing.
        positive_class: the class to keep against all others, which become one; None to keep all classes.
        synthetic_shape: channels, height and width of synthetic images.
        synthetic_classes: number of synthetic classes, ≥ 2.
        synthetic_samples: number of synthetic training images, ≥ 1.

    Raises:
        UserError: the name or class is unknown, or the data is missing or damaged.
    """
    data_dir = Path(data_dir)
    if is_reference(name):
        own = _load_reference(name, data_dir, args)
        if positive_class is None:
            return own
        if not isinstance(own, ImageData):
            raise UserError(f"--positive-class needs hvd_adam.data.ImageData, but {name} returns torch data sets")
        data = own
    elif name == "digits":
        data = digits.load()
    elif name == "cifar10":
        data = cifar10.load(data_dir, download=download)
    elif name == "synthetic":
        data = synthetic.load(shape=synthetic_shape, classes=synthetic_classes, samples=synthetic_samples)
    else:
        raise unknown("data set", name, DATASETS)
    return data if positive_class is None else one_against_rest(data, positive_class)


def _load_reference(name: str, data_dir: Path, args: Mapping[str, object] | None) -> ImageData | Datasets:
    # They import torch, which the other data sets do not need.
    from hvd_adam.data.own import checked
    from hvd_adam.data.workers.random_state import preserved, seed_all

    # `random_split` draws: all ranks, a resumed run and an evaluation must have the same training samples.
    with preserved():
        seed_all(0)
        if data_dir != Path(DATA_DIR) and not accepts(name, "data set", "data_dir"):
            raise UserError(f"--data-dir {data_dir} has no effect: {name} has no parameter data_dir")
        made = call(name, "data set", {"data_dir": data_dir}, args, "--data-args")
    return checked(made, f"data set {name!r}")
