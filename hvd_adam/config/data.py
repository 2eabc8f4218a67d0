"""`DataConfig`: the options that choose the data set and the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hvd_adam.config.functions import require_plain
from hvd_adam.config.options import option, positive_integer, require


@dataclass(frozen=True)
class DataConfig:
    """The data set and the device."""

    dataset: str = option(
        "digits", "digits, cifar10, synthetic, imagefolder, or a function of yours as package.module:function"
    )
    data_args: Mapping[str, Any] | None = option(
        None, """arguments of your function for the data set, as in '{"size": 64}'"""
    )
    data_dir: str = option("data", "folder of the data set; cifar10 is downloaded to it if missing", path=True)
    image_size: int = option(224, "height and width of the images of imagefolder, ≥ 8")
    cache: str | None = option(
        None, "folder for decoded images of imagefolder, made once per host; training then only crops", path=True
    )
    max_corrupt: int = option(10, "unreadable image files that each rank skips before the run ends, ≥ 0")
    workers: int | None = option(
        None, "processes per rank that read images, ≥ 0 (default: its share of the cores less one, 1 to 16)"
    )
    download: bool = option(True, "allow the download of cifar10 if it is missing")
    positive_class: str | None = option(None, "train a binary classifier: this class against all others")
    synthetic_shape: str = option("3x32x32", "shape of the synthetic images, CHANNELSxHEIGHTxWIDTH")
    synthetic_classes: int = option(10, "number of synthetic classes, ≥ 2")
    synthetic_samples: int = option(
        4096, "number of synthetic training images, ≥ 1; a fifth as many are added for testing"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU where there is one, else the CPU")

    def __post_init__(self) -> None:
        require(self.synthetic_classes >= 2, "synthetic-classes", self.synthetic_classes, "at least 2")
        require(self.synthetic_samples >= 1, "synthetic-samples", self.synthetic_samples, "at least 1")
        require_plain(self.data_args, "data-args")
        require(self.image_size >= 8, "image-size", self.image_size, "at least 8")
        require(self.max_corrupt >= 0, "max-corrupt", self.max_corrupt, "0 or above")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or above")
        self.synthetic_size()

    def synthetic_size(self) -> tuple[int, int, int]:
        """Returns the channels, height and width of the synthetic images."""
        sizes = [positive_integer(part) for part in self.synthetic_shape.lower().split("x")]
        valid = len(sizes) == 3 and all(sizes)
        require(valid, "synthetic-shape", self.synthetic_shape, "CHANNELSxHEIGHTxWIDTH, as in 3x32x32")
        channels, height, width = sizes
        return channels, height, width
