"""The embedded data set: scikit-learn's `load_digits`, 1,797 real 8×8 images of handwritten digits."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hvd_adam.data.images import ImageData
from hvd_adam.errors import UserError
from hvd_adam.extras import install_command


def load() -> ImageData:
    """Returns the digits, 1 channel of 8×8; every fifth of each class is a test image.

    Grey values from 0 to 16 are mapped to the nearest of 0 to 255. The split depends only on the order of the
    data, not on a seed or on the version of scikit-learn.

    Raises:
        UserError: scikit-learn is not installed.
    """
    table = _table()
    levels, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    images = ((levels * 255 + 8) // 16).astype(np.uint8)[:, np.newaxis]
    is_test = _every_fifth_of_each_class(labels)
    return ImageData(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
    )


def _table() -> np.ndarray:
    """Returns 64 grey values and the label of each image; importing scikit-learn would take a second."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError(
            f"data set digits needs scikit-learn, which is not installed: {install_command('sklearn')}"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.exists():
        return np.loadtxt(file, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits  # it knows where this release has the file

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.int64)


def _every_fifth_of_each_class(labels: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[4::5]] = True
    return chosen
