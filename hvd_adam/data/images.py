"""`ImageData`: labelled images in memory, split into training and test images."""

import hashlib
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from hvd_adam.errors import UserError


@dataclass(frozen=True)
class ImageData:
    """Labelled images as numpy arrays.

    Raises:
        UserError: shapes, dtypes or labels do not match, names of classes are no texts or not unique, or `mean`
            and `std` do not fit.
    """

    name: str
    """Name in messages and run directories."""
    classes: tuple[str, ...]
    """Names of the classes, at least two different ones; a label is an index into them."""
    train_images: np.ndarray
    """uint8, shape `(samples, channels, height, width)`, 0 to 255."""
    train_labels: np.ndarray
    """int64, shape `(samples,)`."""
    test_images: np.ndarray
    """As `train_images`, with the same channels, height and width."""
    test_labels: np.ndarray
    """As `train_labels`."""
    augment: bool = False
    """Whether training pads the images and crops and flips them at random."""
    crop: int | None = None
    """Side in pixels of the squares that training crops and flips at random, and of the center crops for testing.
    The images then stay on the host, where they may be memory-mapped. None: they are copied to the device."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel for the normalization, in units where 255 is 1; None: that of the training images."""
    std: tuple[float, ...] | None = None
    """As `mean`, the standard deviation, above 0. Both are given, or neither."""
    checksum: str = ""
    """Fingerprint of the training images, if it is known; empty: it is computed from them."""

    def __post_init__(self) -> None:
        require_class_names(self.classes, f"data set {self.name}")
        if len(self.classes) < 2:
            raise UserError(f"data set {self.name}: {len(self.classes)} classes, at least 2 are needed")
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            self._check(images, labels, f"data set {self.name}: the {part}")
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise UserError(
                f"data set {self.name}: training images of shape {self.train_images.shape[1:]} but test "
                f"images of shape {self.test_images.shape[1:]}: they must be the same"
            )
        if self.crop is not None and not 1 <= self.crop <= min(self.train_images.shape[2:]):
            raise UserError(
                f"data set {self.name}: crops of side {self.crop} from images of {self.train_images.shape[2]} by "
                f"{self.train_images.shape[3]} pixels: they must be at least 1 and fit"
            )
        require_statistics(self.mean, self.std, f"data set {self.name}", channels=self.channels)

    def _check(self, images: np.ndarray, labels: np.ndarray, what: str) -> None:
        if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4):
            raise UserError(
                f"{what} images must be a numpy array of dtype uint8 and shape (samples, channels, height, "
                f"width), not {_describe(images)}"
            )
        if images.size == 0:
            raise UserError(f"{what} images are empty: their shape is {images.shape}")
        if _is_channels_last(images.shape[1:]):
            raise UserError(
                f"{what} images of shape {images.shape} have their {images.shape[3]} channels last: their shape "
                "must be (samples, channels, height, width), as images.transpose(0, 3, 1, 2) returns it"
            )
        if not (isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.shape == images.shape[:1]):
            raise UserError(
                f"{what} labels must be a numpy array of dtype int64 and shape ({images.shape[0]},), "
                f"not {_describe(labels)}"
            )
        if labels.min() < 0 or labels.max() >= len(self.classes):
            raise UserError(
                f"{what} labels run from {labels.min()} to {labels.max()}, but with {len(self.classes)} "
                f"classes they must lie in 0 to {len(self.classes) - 1}"
            )

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of each image of a batch."""
        return self.channels, *self.image_size

    @property
    def channels(self) -> int:
        """Number of channels of each image."""
        return int(self.train_images.shape[1])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of each image of a batch."""
        height, width = self.train_images.shape[2:]
        return (height, width) if self.crop is None else (self.crop, self.crop)

    def summary(self) -> str:
        """Returns the shape of an image and the numbers of classes and images, for the first line of a run."""
        shape = "×".join(map(str, self.sample_shape))
        train, test = len(self.train_images), len(self.test_images)
        return f"{shape}, {len(self.classes)} classes, {train} training and {test} test images"

    def fingerprint(self) -> str:
        """Returns a checksum of the training images and labels with their shapes: 16 hexadecimal digits."""
        if self.checksum:
            return self.checksum
        digest = hashlib.sha256(repr(self.train_images.shape).encode())
        for start in range(0, len(self.train_images), 1024):  # a non-contiguous array is copied: in small parts
            digest.update(np.ascontiguousarray(self.train_images[start : start + 1024]).data)
        digest.update(np.ascontiguousarray(self.train_labels).data)
        return digest.hexdigest()[:16]


def require_class_names(classes: Any, what: str) -> None:
    """Checks the names of the classes; none is accepted.

    Args:
        classes: what the user has given.
        what: where, for the message.

    Raises:
        UserError: they are not a list or tuple of different texts.
    """
    is_sequence = isinstance(classes, list | tuple) and all(isinstance(item, str) for item in classes)
    if not is_sequence or len(set(classes)) < len(classes):
        raise UserError(
            f"{what}: classes is {classes!r:.60}: it must be a tuple of the names of the classes, different texts"
        )


def require_statistics(mean: Any, std: Any, what: str, *, channels: int | None = None) -> None:
    """Checks the mean and standard deviation of the channels, which are both given or both None.

    Args:
        mean: what the user has given.
        std: as `mean`.
        what: where, for the message.
        channels: of an image; None: not known.

    Raises:
        UserError: one of them is missing, they are not finite numbers, `std` is not above 0, or their lengths do
            not fit. One value for all channels is accepted.
    """
    if mean is None and std is None:
        return
    if mean is None or std is None:
        given, missing = ("mean", "std") if std is None else ("std", "mean")
        raise UserError(f"{what}: {given} is given without {missing}: give both, or neither")
    for name, values in (("mean", mean), ("std", std)):
        is_sequence = isinstance(values, list | tuple) and all(isinstance(value, Real) for value in values)
        if not is_sequence or not all(map(math.isfinite, values)):
            raise UserError(f"{what}: {name} is {values!r:.60}: it must be a tuple of one number per channel")
    if not all(value > 0 for value in std):
        raise UserError(f"{what}: std is {std!r:.60}: each value must be above 0")
    if not len(mean) == len(std) > 0:
        raise UserError(f"{what}: mean has {len(mean)} values and std {len(std)}: give each one per channel")
    if channels is not None and len(mean) not in (1, channels):
        raise UserError(
            f"{what}: mean and std have {len(mean)} values, but the images {channels} channels: give one value "
            "per channel"
        )


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Returns whether the shape of an image can hardly be channels, height, width.

    One column of many channels, (64, 1000, 1), and one row of any length are accepted: they are time series.
    """
    first, second, last = shape
    return min(first, second) > 4 and (last in (3, 4) or (last < 5 and first == second))


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"one of dtype {value.dtype} and shape {value.shape}"
    return f"a {type(value).__name__}"


def one_against_rest(data: ImageData, positive_class: str) -> ImageData:
    """Returns the data with two classes: the positive class (label 1) and "rest" (label 0).

    Args:
        data: with any number of classes.
        positive_class: name of a class.

    Raises:
        UserError: the data has no such class.
    """
    if positive_class not in data.classes:
        raise UserError(
            f"data set {data.name} has no class {positive_class!r}: use one of {', '.join(data.classes)}"
        )
    positive = data.classes.index(positive_class)
    return replace(
        data,
        classes=("rest", positive_class),
        train_labels=(data.train_labels == positive).astype(np.int64),
        test_labels=(data.test_labels == positive).astype(np.int64),
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and population standard deviation of each channel, in units where 255 is 1.

    The sums are exact integers, so the result is identical on every rank and machine. The standard deviation of a
    constant channel is returned as 1.

    Args:
        images: uint8, shape `(samples, channels, height, width)`.
    """
    means, deviations = [], []
    for channel in range(images.shape[1]):
        histogram = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1024):  # bincount makes int64 copies: keep them small
            histogram += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
        counts = [int(count) for count in histogram]
        total = sum(counts)
        first = sum(value * count for value, count in enumerate(counts))
        second = sum(value * value * count for value, count in enumerate(counts))
        variance = (total * second - first * first) / (total * total)
        means.append(first / (total * 255))
        deviations.append(variance**0.5 / 255 if variance > 0 else 1.0)
    return tuple(means), tuple(deviations)
