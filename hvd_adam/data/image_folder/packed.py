"""The packed cache of a folder of images: all images decoded, of one size, in one file that is memory-mapped.

    CACHE/imagefolder-<key>/   train.images  train.labels.npy  test.images  test.labels.npy  manifest.json

The key is a checksum of the list of files with the times of their last changes, of the size of the images and of
the format. A host makes a cache once, under a lock, in a draft that is renamed when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from hvd_adam.data.datasets import Datasets
from hvd_adam.data.image_folder.files import MEAN, NAME, STD, ImageFiles, centered_transform
from hvd_adam.data.image_folder.scan import FileList, ImageFolder
from hvd_adam.data.images import ImageData
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.errors import UserError

FORMAT = 1
PARTS = ("train", "test")

_BATCH = 64  # images between two reports of progress
_POLL_SECONDS = 1.0

Progress = Callable[[str], None]


def open_cache(
    files: ImageFolder,
    cache: Path,
    side: int,
    crop: int,
    *,
    workers: int,
    max_unreadable: int,
    progress: Progress,
) -> ImageData:
    """Returns the images of a cache, which is made if it is not there.

    Args:
        files: the files, with all their classes.
        cache: folder of the caches.
        side: height and width of the packed images in pixels.
        crop: of the crops for training and testing, at most `side`.
        workers: as for `load_packed`.
        max_unreadable: as for `load_packed`.
        progress: as for `load_packed`.

    Raises:
        UserError: the cache cannot be written, or more files cannot be read.
    """
    content = f"{FORMAT} {side} {files.classes} {files.train.fingerprint()} {files.test.fingerprint()}"
    # A file may change and keep its size. Times are no part of the checksum: hosts may have copies of the files.
    times = b"".join(part.modified.astype("<i8").tobytes() for part in (files.train, files.test))
    folder = cache / f"{NAME}-{_checksum(content.encode() + times)}"
    unreadable = UnreadableSamples(max_unreadable)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        manifest = _read_manifest(folder, side)
        if manifest is None:
            with _locked(cache / f".{folder.name}.lock", progress):
                manifest = _read_manifest(folder, side)  # another rank of this host may have made it meanwhile
                if manifest is None:
                    manifest = _make(files, folder, side, workers, unreadable, progress)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        needed = (len(files.train) + len(files.test)) * 3 * side**2
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write the cache {cache}: {reason} (it needs {needed / 1e9:.2f} GB): choose another "
            "--cache, or leave the option out"
        ) from None
    unreadable.add(manifest["unreadable"])  # the rank that has made the cache has reported them
    images = {
        part: np.memmap(
            folder / f"{part}.images", dtype=np.uint8, mode="r", shape=(manifest["counts"][part], 3, side, side)
        )
        for part in PARTS
    }
    labels = {part: np.load(folder / f"{part}.labels.npy") for part in PARTS}
    return ImageData(
        name=NAME,
        classes=files.classes,
        train_images=images["train"],
        train_labels=labels["train"],
        test_images=images["test"],
        test_labels=labels["test"],
        crop=crop,
        mean=MEAN,
        std=STD,
        checksum=_checksum(content.encode()),
    )


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _read_manifest(folder: Path, side: int) -> dict[str, Any] | None:
    """Returns the manifest of a complete cache of images of this side, or None."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["sizes"]}
        images = {part: manifest["counts"][part] * 3 * side**2 for part in PARTS}
        is_whole = sizes == manifest["sizes"] and all(
            sizes[f"{part}.images"] == size > 0 and f"{part}.labels.npy" in sizes for part, size in images.items()
        )
        is_whole = is_whole and all(isinstance(message, str) for message in manifest["unreadable"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if is_whole else None


class _locked:
    """Holds the lock of a cache; reports progress while another process does."""

    def __init__(self, path: Path, progress: Progress) -> None:
        self._lock, self._progress = FileLock(path), progress

    def __enter__(self) -> None:
        while True:
            try:
                self._lock.acquire(timeout=_POLL_SECONDS)
                return
            except Timeout:
                self._progress("the wait for another process of this host that makes the cache of images")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _make(
    files: ImageFolder, folder: Path, side: int, workers: int, unreadable: UnreadableSamples, progress: Progress
) -> dict[str, Any]:
    """Makes a cache and returns its manifest."""
    draft = folder.with_name(f".{folder.name}.new")
    for stale in (draft, folder):  # of a process that was killed; or a damaged one
        shutil.rmtree(stale, ignore_errors=True)
    draft.mkdir()
    try:
        counts = {
            part: _pack(getattr(files, part), draft / part, side, workers, unreadable, progress) for part in PARTS
        }
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        manifest = {"format": FORMAT, "counts": counts, "sizes": sizes, "unreadable": unreadable.messages}
        with open(draft / "manifest.json", "w") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return manifest


def _pack(
    files: FileList, path: Path, side: int, workers: int, unreadable: UnreadableSamples, progress: Progress
) -> int:
    """Writes the images that can be read, and their labels; returns their number."""
    samples = ImageFiles(files, centered_transform(side, side))
    loader = WorkerLoader(
        Datasets(samples, samples, (), NAME, preload=(ImageFiles.__module__,)),
        torch.device("cpu"),
        workers=workers,
        dtype=torch.uint8,
        unreadable=unreadable,
    )
    labels: list[np.ndarray] = []
    # Written, not mapped: on a full disk a mapped file ends the process with SIGBUS, a write raises an error.
    with open(path.with_name(f"{path.name}.images"), "wb") as file:
        for done, (images, targets) in enumerate(loader.test_batches(_BATCH)):
            progress(f"the cache of images, {path.name} {done * _BATCH} of {len(files)}")
            file.write(np.ascontiguousarray(images.numpy()).data)
            labels.append(targets.numpy())
        file.flush()
        os.fsync(file.fileno())
    loader.close()
    if not labels:
        raise UserError(f"none of the {path.name} images in {files.folder} can be read")
    np.save(path.with_name(f"{path.name}.labels.npy"), np.concatenate(labels))
    return sum(map(len, labels))
