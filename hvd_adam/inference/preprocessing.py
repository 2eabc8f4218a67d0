"""`fit`: an image as the model's training had its test images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hvd_adam.models.torchvision_compat import import_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of the kind of pixels, by the number of channels."""


def fit(image: Image, resize: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
    """Resizes an image to cover a rectangle, and crops its center to that and then to `size`.

    For a square it is the transform of an image folder's test images.

    Args:
        image: of any size.
        resize: height and width to cover; an image that has just these is not resized.
        size: height and width of the result.

    Returns:
        uint8, shape `(channels, *size)`.
    """
    import_torchvision()  # makes the following import work where torchvision was built for another PyTorch
    from torchvision.transforms.v2 import functional as F

    resized = F.resize(image, covering(image.height, image.width, *resize))
    pixels: torch.Tensor = F.pil_to_tensor(F.center_crop(F.center_crop(resized, list(resize)), list(size)))
    return pixels


def covering(height: int, width: int, rows: int, columns: int) -> list[int]:
    """Returns height and width of an image that is resized to cover a rectangle, with its proportions.

    One of them is the rectangle's; the other is rounded down, as `torchvision.transforms.Resize` does.

    Args:
        height: of the image.
        width: of the image.
        rows: height of the rectangle.
        columns: its width.
    """
    if width * rows <= height * columns:
        return [int(columns * height / width), columns]
    return [rows, int(rows * width / height)]
