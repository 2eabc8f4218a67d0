"""`load` and `load_packed`: a folder of images as `Datasets`, or as `ImageData` from a packed cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hvd_adam.data.datasets import Datasets
from hvd_adam.data.image_folder import packed
from hvd_adam.data.image_folder.files import MEAN, NAME, STD, ImageFiles, centered_transform, training_transform
from hvd_adam.data.image_folder.scan import scan
from hvd_adam.data.images import ImageData, one_against_rest


def resized_side(image_size: int) -> int:
    """Returns the length to which the shorter side of a test image is resized before its center is cropped.

    256 pixels for crops of 224, as is usual for ImageNet, and as many in proportion for other sizes.

    Args:
        image_size: side of the crop in pixels.
    """
    return round(image_size * 256 / 224)


def load(folder: Path, *, image_size: int = 224, positive_class: str | None = None) -> Datasets:
    """Returns the images of a folder, which are decoded when they are read.

    Training images are random crops, resized and flipped at random; of test images the center is used.

    Args:
        folder: see `scan`.
        image_size: height and width of the images in pixels.
        positive_class: the class to keep against all others, which become one; None to keep all classes.

    Raises:
        UserError: as `scan`, or there is no such class.
    """
    files = scan(folder)
    if positive_class is not None:
        files = files.one_against_rest(positive_class)
    return Datasets(
        train=ImageFiles(files.train, training_transform(image_size)),
        test=ImageFiles(files.test, centered_transform(resized_side(image_size), image_size)),
        classes=files.classes,
        name=NAME,
        mean=MEAN,
        std=STD,
        shape=(3, image_size, image_size),
        resize=(resized_side(image_size),) * 2,
        fingerprint=files.train.fingerprint(),
        preload=(ImageFiles.__module__,),
    )


def load_packed(
    folder: Path,
    cache: Path,
    *,
    image_size: int = 224,
    positive_class: str | None = None,
    workers: int = 0,
    max_unreadable: int = 0,
    progress: Callable[[str], None] = lambda doing: None,
) -> ImageData:
    """Returns the images of a folder from a packed cache, which is made if it is not there.

    The cache holds the center square of each image, with the shorter side resized as for testing. Training images
    are random crops of it, flipped at random; their size is not random as with `load`.

    Args:
        folder: as for `load`.
        cache: folder of the caches of this host; several may share it.
        image_size: as for `load`.
        positive_class: as for `load`.
        workers: processes that decode images when the cache is made.
        max_unreadable: how many files that cannot be read are left out; one more is an error.
        progress: called again and again with what is being done, while that takes long. May raise.

    Raises:
        UserError: as `load`, more files cannot be read, or the cache cannot be written.
    """
    found = scan(folder)
    side = resized_side(image_size)
    data = packed.open_cache(
        found, cache, side, image_size, workers=workers, max_unreadable=max_unreadable, progress=progress
    )
    return data if positive_class is None else one_against_rest(data, positive_class)
