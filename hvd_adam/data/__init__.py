"""Data sets by name, as numpy arrays. Imports no torch; batches come from ``hvd_adam.data.loader``."""

from pathlib import Path

from hvd_adam.data import cifar10, digits, synthetic
from hvd_adam.data.images import ImageData, one_against_rest
from hvd_adam.errors import UserError
from hvd_adam.import_path import call, is_reference, unknown

__all__ = ["DATASETS", "ImageData", "load"]

DATASETS = ("digits", "cifar10", "synthetic")


def load(
    name: str,
    *,
    data_dir: str | Path = "data",
    download: bool = True,
    positive_class: str | None = None,
    synthetic_shape: tuple[int, int, int] = (3, 32, 32),
    synthetic_classes: int = 10,
    synthetic_samples: int = 4096,
) -> ImageData:
    """Return the data set ``name``: one of ``DATASETS``, or ``package.module:function``.

    Such a function is called with ``data_dir`` (a path) and returns ``ImageData``. ``positive_class`` names
    the one class that is to be told from all the others. ``download`` allows cifar10 to be fetched into
    ``data_dir`` where it is missing. Raises UserError for an unknown name or class, and for data that is
    missing or damaged.
    """
    data_dir = Path(data_dir)
    if is_reference(name):
        data = _load_reference(name, data_dir)
    elif name == "digits":
        data = digits.load()
    elif name == "cifar10":
        data = cifar10.load(data_dir, download=download)
    elif name == "synthetic":
        data = synthetic.load(shape=synthetic_shape, classes=synthetic_classes, samples=synthetic_samples)
    else:
        raise unknown("data set", name, DATASETS)
    return data if positive_class is None else one_against_rest(data, positive_class)


def _load_reference(name: str, data_dir: Path) -> ImageData:
    data = call(name, "data set", data_dir=data_dir)
    if not isinstance(data, ImageData):
        raise UserError(f"data set {name!r} returned a {type(data).__name__}: return hvd_adam.data.ImageData")
    return data
