"""`HostImages`: cuts crops from images that stay on the host, such as those of a memory-mapped file."""

from __future__ import annotations

import mmap

import numpy as np
import torch

from hvd_adam.data.protocols import Batch


class HostImages:
    """Labelled images on the host, of which batches of crops are copied to the device.

    Images are cropped before they are copied, so that a GPU receives no byte that it does not need.

    Args:
        images: uint8, shape `(samples, channels, height, width)`; in memory or memory-mapped.
        labels: int64, shape `(samples,)`.
        side: of the crops in pixels, at most height and width.
        device: where the batches are used.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, side: int, device: torch.device) -> None:
        self._images, self._labels, self._side, self._device = images, labels, side, device
        self._map = _read_only_map(images)

    @property
    def places(self) -> tuple[int, int]:
        """Number of places of a crop's first row, and of its first column."""
        height, width = self._images.shape[2:]
        return height - self._side + 1, width - self._side + 1

    def crops(self, indices: np.ndarray, top: np.ndarray, left: np.ndarray, flip: np.ndarray) -> Batch:
        """Returns a crop of each image, some of them flipped from left to right, and the labels.

        Args:
            indices: of the images, int64 of shape `(n,)`.
            top: first row of each crop, int64 of shape `(n,)`.
            left: as `top`, the first column.
            flip: whether to flip, bool of shape `(n,)`.
        """
        side, pinned = self._side, self._device.type == "cuda"
        shape = (len(indices), self._images.shape[1], side, side)
        batch = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        for row, index, y, x, mirrored in zip(batch, indices, top, left, flip, strict=True):
            row.numpy()[...] = self._images[index, :, y : y + side, x : x + side]
            if mirrored:
                row.copy_(row.flip(2))  # NumPy would copy reversed rows byte by byte
        labels = torch.from_numpy(self._labels[indices])
        if self._map is not None:
            # The pages stay in the host's page cache, which all its ranks share. They would otherwise count as
            # memory of this process, up to the size of the whole file.
            self._map.madvise(mmap.MADV_DONTNEED)
        if pinned:
            labels = labels.pin_memory()
        return batch.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def centers(self, start: int, stop: int) -> Batch:
        """Returns images `start` to `stop`, not included, cropped as by torchvision's `CenterCrop`, and labels."""
        indices = np.arange(start, stop)
        top, left = (np.full(len(indices), round((count - 1) / 2)) for count in self.places)
        return self.crops(indices, top, left, np.zeros(len(indices), dtype=bool))


def _read_only_map(images: np.ndarray) -> mmap.mmap | None:
    """Returns the map of a file that is read only, such as a packed cache; None for other arrays.

    Without their pages, other maps would lose what was written to them: copy-on-write maps of a file show its
    content again, and anonymous ones zeros.
    """
    is_read_only = isinstance(images, np.memmap) and images.mode == "r"
    return images.base if is_read_only and isinstance(images.base, mmap.mmap) else None
