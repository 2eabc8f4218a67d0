"""The embedded data set: scikit-learn's ``load_digits``, 1,797 real 8×8 images of handwritten digits."""

import numpy as np

from hvd_adam.data.images import ImageData
from hvd_adam.errors import UserError


def load() -> ImageData:
    """Return the digits, 1 channel of 8×8, with a fixed stratified split: of each class, every fifth is test.

    The grey values 0 to 16 become the nearest of 0 to 255. The split depends on nothing but the data's order:
    not on a seed, and not on the version of scikit-learn. Raises UserError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits  # here, because it takes a second that other data sets save
    except ImportError as error:
        raise UserError(f"data set digits needs scikit-learn ({error}): pip install scikit-learn") from error
    digits = load_digits()
    levels = digits.images.astype(np.int64)
    images = ((levels * 255 + 8) // 16).astype(np.uint8)[:, np.newaxis]
    labels = digits.target.astype(np.int64)
    is_test = _every_fifth_of_each_class(labels)
    return ImageData(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
    )


def _every_fifth_of_each_class(labels: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[4::5]] = True
    return chosen
