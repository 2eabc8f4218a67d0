"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32×32 in ten classes, from the files of its home page.

The files and their place are those of `torchvision.datasets.CIFAR10`, so either finds what the other has
downloaded. A smaller set in the same format works too, with as few as one training batch.
"""

from pathlib import Path
from typing import Any

import numpy as np

from hvd_adam.data.cifar10_archive import FOLDER, OFFICIAL, Archive, fetch
from hvd_adam.data.images import ImageData
from hvd_adam.data.plain_pickle import PlainPickleError, load_dictionary
from hvd_adam.errors import UserError

_TRAINING_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST_FILE = "test_batch"
_META_FILE = "batches.meta"
_SHAPE = (3, 32, 32)
_OFFICIAL_BATCH = 10_000  # images in each of the five training files


def load(data_dir: Path, *, download: bool = True, archive: Archive = OFFICIAL) -> ImageData:
    """Returns CIFAR-10, or a smaller set in its format.

    The pickles are read without running their code.

    Args:
        data_dir: the folder `cifar-10-batches-py` or its parent. If the folder is missing, the archive is unpacked
            there.
        download: whether to download the archive if it is missing.
        archive: where the files come from.

    Raises:
        UserError: the files are missing and cannot be downloaded, or a file is truncated, damaged or of another
            format.
    """
    folder = data_dir / FOLDER
    try:
        if (data_dir / _META_FILE).is_file():
            folder = data_dir
        elif not folder.is_dir():
            fetch(data_dir, download=download, archive=archive)
        present = [name for name in _TRAINING_FILES if (folder / name).exists()]
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror}): choose another data folder") from error
    classes = _read_classes(folder / _META_FILE)
    batches = [_read_batch(folder / name, len(classes)) for name in present]
    small = all(len(images) < _OFFICIAL_BATCH for images, _ in batches)  # a small set may have fewer files
    expected = _TRAINING_FILES[: max(1, len(present))] if small else _TRAINING_FILES
    for name in expected:
        if name not in present:
            raise _unreadable(folder / name, "is missing")
    test_images, test_labels = _read_batch(folder / _TEST_FILE, len(classes))
    return ImageData(
        name="cifar10",
        classes=classes,
        train_images=np.concatenate([images for images, _ in batches]),
        train_labels=np.concatenate([labels for _, labels in batches]),
        test_images=test_images,
        test_labels=test_labels,
        augment=True,
    )


def _read_batch(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _read(path)
    images, labels = content.get("data"), content.get("labels")
    size = int(np.prod(_SHAPE))
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size,)):
        raise _unreadable(path, f"has no 'data' of dtype uint8 and shape (samples, {size})")
    if not (isinstance(labels, (list, np.ndarray)) and len(labels) == len(images)):
        raise _unreadable(path, f"has no 'labels' for its {len(images)} images")
    if not all(isinstance(label, (int, np.integer)) and 0 <= label < num_classes for label in labels):
        raise _unreadable(path, f"has labels that are not whole numbers from 0 to {num_classes - 1}")
    return images.reshape(-1, *_SHAPE), np.array(labels, dtype=np.int64)


def _read_classes(path: Path) -> tuple[str, ...]:
    names = _read(path).get("label_names")
    if not (isinstance(names, list) and all(isinstance(name, (str, bytes)) for name in names)):
        raise _unreadable(path, "has no list of 'label_names'")
    return tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else name for name in names)


def _read(path: Path) -> dict[str, Any]:
    try:
        return load_dictionary(path)
    except FileNotFoundError:
        raise _unreadable(path, "is missing") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror})") from error
    except PlainPickleError as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"CIFAR-10 file {path} {reason}: replace it, or remove the folder {path.parent} so that it is unpacked "
        f"again from {OFFICIAL.name}"
    )
