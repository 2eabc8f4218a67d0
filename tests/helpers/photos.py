"""Folders of small generated JPEG files, in torchvision's layout."""

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel", "fox")


def write_photo(path, seed, side=40):
    """Writes one smooth random image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((side * 5 // 4, side), Image.Resampling.BICUBIC).save(path, quality=90)


def write_photos(folder, train=6, test=2, classes=CLASSES, damaged=()):
    """Writes so many images per class.

    Args:
        folder: receives train/ and val/, or the class folders themselves if `test` is 0.
        train: training images per class.
        test: test images per class.
        classes: names of the classes.
        damaged: paths relative to `folder` of files that are cut off in the middle.
    """
    for part, count in (("train" if test else "", train), ("val", test)):
        for label, name in enumerate(classes):
            for number in range(count):
                path = folder / part / name / f"{number:03d}.jpg"
                write_photo(path, seed=[number, label, part == "val"])
    for name in damaged:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder
