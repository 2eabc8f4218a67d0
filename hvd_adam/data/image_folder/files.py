"""`ImageFiles`: a map-style data set that decodes image files and transforms them with torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from hvd_adam.data.datasets import UnreadableSample
from hvd_adam.data.image_folder.scan import FileList
from hvd_adam.models.torchvision_compat import import_torchvision

import_torchvision()  # makes the following import work where torchvision was built for another PyTorch
from torchvision.transforms import v2  # noqa: E402

NAME = "imagefolder"

# Of ImageNet's training images, as torchvision's models are trained with: a fixed normalization needs no pass over
# the files, and is the one that pretrained weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Transform = Callable[[Image.Image], Any]


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """Decodes files to RGB and transforms them.

    Args:
        files: the files.
        transform: maps an RGB image to a uint8 tensor.
    """

    def __init__(self, files: FileList, transform: Transform) -> None:
        self._files, self._transform = files, transform

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Returns an image, uint8 of shape `(3, height, width)`, and its label.

        Raises:
            UnreadableSample: the file cannot be read or decoded.
        """
        return self._transform(decode(self.path(index))), int(self._files.labels[index])

    def path(self, index: int) -> str:
        """Returns the path of a file."""
        return self._files.path(index)


def decode(path: str, mode: str = "RGB") -> Image.Image:
    """Reads an image.

    Args:
        path: of the file.
        mode: Pillow's name of the kind of pixels to convert it to, such as "L", which is gray.

    Raises:
        UnreadableSample: the file cannot be read or decoded.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            converted: Image.Image = image if image.mode == mode else image.convert(mode)  # which would copy it
            converted.load()
            return converted
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise UnreadableSample(path, "not an image") from None
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSample(path, reason) from None


def training_transform(size: int) -> Transform:
    """Returns torchvision's usual augmentation: a random part of an image, resized to a square, and a random flip.

    Args:
        size: side of the result in pixels.
    """
    transform: Transform = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return transform


def centered_transform(side: int, size: int) -> Transform:
    """Returns a transform that resizes the shorter side of an image and crops its center.

    The center is that of the square of side `side`, which a packed cache holds, and not that of the whole image:
    `CenterCrop` rounds, and the two may be one pixel apart. They are the same for crops of 224.

    Args:
        side: length of the shorter side in pixels.
        size: side of the crop in pixels, at most `side`.
    """
    crops = v2.CenterCrop(side), v2.CenterCrop(size)
    transform: Transform = v2.Compose([v2.Resize(side), *crops, v2.PILToTensor()])
    return transform
