"""Finds the images of a folder with one folder per class, in torchvision's layout.

    DIR/train/cat/1.jpg   DIR/val/cat/7.jpg      training and test images; test/ is read where there is no val/
    DIR/cat/1.jpg         DIR/dog/2.jpg          every fifth image of each class is a test image

The result depends on names and sizes of the files only, not on the order in which a file system lists them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hvd_adam.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's
TEST_FOLDERS = ("val", "test")
HELD_OUT = 5  # every fifth image is a test image where there is no folder of them

_SCAN_THREADS = 16  # class folders at a time: on network file systems most of the time is waiting


@dataclass(frozen=True)
class FileList:
    """Labelled image files, sorted by class and path.

    Paths are numpy bytes: a list of a million Python strings would be copied into every worker process.

    Attributes:
        folder: that the paths start from.
        paths: bytes, shape `(files,)`.
        labels: int64, shape `(files,)`.
        sizes: in bytes, int64, shape `(files,)`.
        modified: times of the last changes in nanoseconds, int64, shape `(files,)`.
    """

    folder: Path
    paths: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    modified: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Returns the path of a file."""
        return os.path.join(self.folder, os.fsdecode(self.paths[index].item()))

    def chosen(self, which: np.ndarray) -> FileList:
        """Returns some of the files.

        Args:
            which: bool, shape `(files,)`.
        """
        columns = {name: getattr(self, name)[which] for name in ("paths", "labels", "sizes", "modified")}
        return replace(self, **columns)

    def fingerprint(self) -> str:
        """Returns a checksum of names, labels and sizes: 16 hexadecimal digits. It does not depend on `folder`."""
        digest = hashlib.sha256(b"\0".join(path.item() for path in self.paths))
        digest.update(self.labels.astype("<i8").data)
        digest.update(self.sizes.astype("<i8").data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageFolder:
    """The files of a folder of images.

    Attributes:
        classes: names of the class folders, sorted.
        train: training images.
        test: test images.
    """

    classes: tuple[str, ...]
    train: FileList
    test: FileList

    def one_against_rest(self, positive_class: str) -> ImageFolder:
        """Returns it with two classes, as `images.one_against_rest`.

        Raises:
            UserError: there is no such class.
        """
        if positive_class not in self.classes:
            raise UserError(
                f"data set imagefolder has no class {positive_class!r}: use one of {', '.join(self.classes)}"
            )
        positive = self.classes.index(positive_class)
        train, test = (
            replace(files, labels=(files.labels == positive).astype(np.int64)) for files in (self.train, self.test)
        )
        return ImageFolder(("rest", positive_class), train, test)


def scan(folder: Path) -> ImageFolder:
    """Finds the images of a folder.

    Raises:
        UserError: the folder cannot be read, there are fewer than two classes, a class has no images, or training
            and test images have different classes.
    """
    try:
        if not folder.is_dir():
            raise UserError(f"--data-dir {folder} is not a folder: give one with a folder of images per class")
        return _scan(folder)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror}") from None


def images_below(folder: str) -> list[str]:
    """Returns the images in a folder and its subfolders, sorted; hidden ones are left out.

    Raises:
        OSError: the folder cannot be read.
        UserError: a link leads to a folder that it is in.
    """
    return sorted(os.fsdecode(path) for path, *_ in _images(folder, []))


def _scan(folder: Path) -> ImageFolder:
    train_folder = folder / "train"
    if not train_folder.is_dir():
        return _split(*_read_part(folder))
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if test_folder is None:
        raise UserError(
            f"{folder} has a folder train but neither val nor test: add one with test images, or give --data-dir "
            f"{train_folder} to hold out every fifth image"
        )
    (classes, train), (test_classes, test) = _read_part(train_folder), _read_part(test_folder)
    for own, part, others, other_part in (
        (classes, train_folder, test_classes, test_folder),
        (test_classes, test_folder, classes, train_folder),
    ):
        missing = sorted(set(own) - set(others))
        if missing:
            raise UserError(f"{part} has the class {missing[0]!r} but {other_part} has not: both need all classes")
    return ImageFolder(classes, train, test)


def _read_part(folder: Path) -> tuple[tuple[str, ...], FileList]:
    """Returns the classes and the images of one part."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        found = f"only one folder, {names[0]!r}" if names else "no folders"
        raise UserError(f"{folder} has {found}: it needs a folder of images for each of at least 2 classes")
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        found_files = list(pool.map(lambda name: sorted(_images(os.path.join(folder, name), [folder])), names))
    for name, files in zip(names, found_files, strict=True):
        if not files:
            raise UserError(
                f"class folder {folder / name} has no images ({', '.join(EXTENSIONS)}): add some, or remove it"
            )
    start = len(os.fsencode(os.path.join(folder, "")))
    counts = [len(files) for files in found_files]
    return tuple(names), FileList(
        folder,
        np.array([path[start:] for files in found_files for path, *_ in files], dtype=np.bytes_),
        np.repeat(np.arange(len(names), dtype=np.int64), counts),
        np.array([size for files in found_files for _, size, _ in files], dtype=np.int64),
        np.array([modified for files in found_files for *_, modified in files], dtype=np.int64),
    )


def _images(folder: str, above: Sequence[str | Path]) -> Iterator[tuple[bytes, int, int]]:
    """Yields path, size and time of the last change of the images in a folder and its subfolders, in no order.

    Args:
        folder: the paths start with it as it is given.
        above: the folders that it was reached through.

    Raises:
        UserError: the folder is one of those above it, by a symbolic link.
    """
    for other in above:
        if os.path.samefile(folder, other):
            raise UserError(f"{folder} is a link to {other}, which it is in: remove the link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # what macOS writes to other file systems looks like an image
                continue
            if entry.is_dir():
                yield from _images(entry.path, [*above, folder])
            elif entry.name.lower().endswith(EXTENSIONS):
                try:
                    found = entry.stat()
                except FileNotFoundError:  # a broken link, which is an unreadable file when it is read
                    yield os.fsencode(entry.path), 0, 0
                    continue
                if stat.S_ISREG(found.st_mode):  # reading a named pipe would wait without end
                    yield os.fsencode(entry.path), found.st_size, found.st_mtime_ns


def _split(classes: tuple[str, ...], files: FileList) -> ImageFolder:
    """Holds out every fifth image of each class for testing."""
    place = np.arange(len(files)) - np.searchsorted(files.labels, files.labels)  # in its class
    is_test = place % HELD_OUT == HELD_OUT - 1
    if not is_test.any():
        raise UserError(
            f"{files.folder} has too few images to hold out every fifth of a class for testing: add images, or "
            "folders train and val"
        )
    return ImageFolder(classes, files.chosen(~is_test), files.chosen(is_test))
