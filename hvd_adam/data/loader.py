"""`DeviceLoader`: makes batches on the device, from uint8 images in its memory or on the host.

Of images in the device's memory, only indices and random words are copied for each batch, without waiting for it.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hvd_adam.data import sampling
from hvd_adam.data.host_images import HostImages
from hvd_adam.data.images import ImageData, channel_statistics, require_statistics
from hvd_adam.data.normalize import Normalization
from hvd_adam.data.protocols import Batch
from hvd_adam.data.transforms import transform_batch

_PADDING = 4  # pixels on each side before the random crop, as in He et al., arXiv 1512.03385, section 4.2


class DeviceLoader:
    """Training and test batches of a data set, on a device.

    A batch is `(images, labels)`: normalized images of shape `(samples, channels, height, width)`; labels int64 of
    shape `(samples,)`.

    Args:
        data: the data set.
        device: where batches are made.
        dtype: of the images.
        channels_last: whether images have channels-last memory format.
        mean: of each channel, in units where 255 is 1; by default that of the data set or its training images.
        std: as `mean`, the standard deviation, above 0; both are given, or neither.
        transform: called with each training image, uint8 of shape `(channels, height, width)` on the device, after
            crop and flip and before normalization; returns another one of the same shape. None: no further one.

    Raises:
        UserError: mean and std do not fit each other or the data.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        data: ImageData,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._transform = transform
        self.data = data
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        require_statistics(mean, std, f"data set {data.name}", channels=data.channels)
        if mean is None or std is None:
            mean, std = data.mean, data.std
        if mean is None or std is None:
            mean, std = channel_statistics(data.train_images)
        self.mean, self.std = tuple(mean), tuple(std)
        self._host_train, self._host_test = (
            None if data.crop is None else HostImages(images, labels, data.crop, self.device)
            for images, labels in (
                (data.train_images, data.train_labels),
                (data.test_images, data.test_labels),
            )
        )
        self._normalize = Normalization(self.mean, self.std, self.device, dtype, self.memory_format)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """As `protocols.Loader`."""
        return self.mean, self.std

    def description(self) -> dict[str, Any]:
        """Returns what a checkpoint records of the data: see `checkpoint.state.TrainingState`."""
        data = self.data
        return {
            "classes": list(data.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "shape": list(data.sample_shape),
            "resize": list(data.test_images.shape[2:]),
            "train_images": len(data.train_images),
            "test_images": len(data.test_images),
            "fingerprint": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return self.data.fingerprint()

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """As `protocols.Loader`."""
        return sampling.steps_per_epoch(len(self.data.train_images), global_batch_size)

    def train_batches(
        self,
        seed: int,
        epoch: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> Iterator[Batch]:
        """As `protocols.Loader`."""
        order = sampling.epoch_order(len(self.data.train_images), seed, epoch)
        places = None if self._host_train is None else self._host_train.places
        if places is None and self.data.augment:
            places = (2 * _PADDING + 1, 2 * _PADDING + 1)
        for step in range(first_step, self.steps_per_epoch(global_batch_size)):
            for micro_batch in range(accumulate):
                part = {"rank": rank, "size": size, "micro_batch": micro_batch, "accumulate": accumulate}
                chosen = [sampling.batch_share(order, step, global_batch_size=global_batch_size, **part)]
                if places is not None:
                    bits = sampling.augmentation_bits(seed, epoch, step, global_batch_size)
                    chosen += _crops(bits[sampling.share(global_batch_size, **part)], places)
                images, labels = self._train_batch(chosen)
                if self._transform is not None:
                    seeds = sampling.transform_seeds(seed, epoch, step, global_batch_size)
                    mine = seeds[sampling.share(global_batch_size, **part)].tolist()
                    images = transform_batch(self._transform, images, mine)
                yield self._normalize(images), labels

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """As `protocols.Loader`; the samples are in order."""
        mine = sampling.evaluation_share(len(self.data.test_images), rank, size)
        for start in range(mine.start, mine.stop, batch_size):
            images, labels = self._test_batch(start, min(start + batch_size, mine.stop))
            yield self._normalize(images), labels

    @cached_property
    def _train(self) -> Batch:
        return self._resident(self.data.train_images, self.data.train_labels)

    @cached_property
    def _test(self) -> Batch:
        return self._resident(self.data.test_images, self.data.test_labels)

    def _resident(self, images: np.ndarray, labels: np.ndarray) -> Batch:
        # Copies: a tensor must not alias an array that the caller may change or that is read-only.
        pixels, classes = (torch.tensor(_forward(array), device=self.device) for array in (images, labels))
        return pixels, classes

    def _upload(self, chosen: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(chosen)
        if self.device.type == "cuda":
            host = host.pin_memory()  # otherwise the copy would wait for the device
        return host.to(self.device, non_blocking=True)

    def _train_batch(self, chosen: list[np.ndarray]) -> Batch:
        """Makes a batch of uint8 images from indices and, if they are cropped, the crops' top, left and flip."""
        if self._host_train is not None:
            return self._host_train.crops(*chosen)
        indices, *crops = self._upload(np.stack(chosen))
        images, labels = (tensor[indices] for tensor in self._train)
        if crops:
            images = crop_and_flip(images, crops[0], crops[1], crops[2].bool(), padding=_PADDING)
        return images, labels

    def _test_batch(self, start: int, stop: int) -> Batch:
        if self._host_test is not None:
            return self._host_test.centers(start, stop)
        images, labels = self._test
        return images[start:stop], labels[start:stop]


def _forward(array: np.ndarray) -> np.ndarray:
    """Returns the array; a copy of a reversed view, such as `images[:, ::-1]`, which PyTorch does not take."""
    return np.ascontiguousarray(array) if min(array.strides) < 0 else array


def _crops(bits: np.ndarray, places: tuple[int, int]) -> list[np.ndarray]:
    """Returns top, left and flip of a crop of each image, int64, from disjoint bits of its random word.

    Args:
        bits: uint64, shape `(n,)`.
        places: number of values of top and of left.
    """
    top, left, flip = (bits & 0x7FFFFFFF) % places[0], (bits >> 32 & 0x7FFFFFFF) % places[1], bits >> 63
    return [part.astype(np.int64) for part in (top, left, flip)]


def crop_and_flip(
    images: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor, *, padding: int
) -> torch.Tensor:
    """Pads images with black, crops each at its own place to the old size, and flips some from left to right.

    Args:
        images: shape `(n, c, h, w)`, any dtype.
        top: first row of each crop in the padded image, int64 of shape `(n,)` in [0, 2·padding]; `padding` leaves
            the image in place.
        left: as `top`, the first column.
        flip: whether to flip, bool of shape `(n,)`.
        padding: pixels on each side.
    """
    count, channels, height, width = images.shape
    device = images.device
    rows = top[:, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    padded = F.pad(images, (padding,) * 4)
    samples = torch.arange(count, device=device).view(-1, 1, 1, 1)
    every_channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[samples, every_channel, rows[:, None, :, None], columns[:, None, None, :]]
