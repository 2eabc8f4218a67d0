"""Synthetic images of any shape, for benchmarks and tests: a fixed pattern for each class, with noise."""

import numpy as np

from hvd_adam.data.images import ImageData
from hvd_adam.errors import UserError


def load(
    *, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, samples: int = 4096, seed: int = 0
) -> ImageData:
    """Returns synthetic images with balanced labels; they depend only on the arguments.

    An image is the mean of its class's pattern and of noise, both uniform in 0 to 255. Any model learns that soon.

    Args:
        shape: channels, height and width, each ≥ 1.
        classes: number of classes, ≥ 2.
        samples: number of training images, ≥ 1. There are a fifth as many test images, at least one of each class.
        seed: of patterns and noise.

    Raises:
        UserError: an argument is out of range.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"the synthetic shape {shape} must be three positive numbers: channels, height, width")
    if classes < 2:
        raise UserError(f"{classes} synthetic classes: at least 2 are needed")
    if samples < 1:
        raise UserError(f"{samples} synthetic samples: at least 1 is needed")
    patterns = _random_bytes((classes, *shape), seed, stream=0)
    train_images, train_labels = _draw(samples, patterns, seed, stream=1)
    test_images, test_labels = _draw(max(classes, samples // 5), patterns, seed, stream=2)
    return ImageData(
        name="synthetic",
        classes=tuple(f"class{index}" for index in range(classes)),
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
    )


def _draw(samples: int, patterns: np.ndarray, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(samples, dtype=np.int64) % len(patterns)
    images = _random_bytes((samples, *patterns.shape[1:]), seed, stream)
    images >>= 1
    images += patterns[labels] >> 1
    return images, labels


def _random_bytes(shape: tuple[int, ...], seed: int, stream: int) -> np.ndarray:
    count = int(np.prod(shape))
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(-(-count // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[:count].reshape(shape)
