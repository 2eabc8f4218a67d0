"""`ImageClassifier`: a trained model with all that its use needs, from images to probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from hvd_adam.data.normalize import per_channel
from hvd_adam.errors import UserError
from hvd_adam.inference.one_by_one import one_by_one
from hvd_adam.inference.preprocessing import MODES, fit
from hvd_adam.models.precision import autocast
from hvd_adam.text import shown

if TYPE_CHECKING:
    from PIL.Image import Image

    Images = torch.Tensor | Image | Sequence[Image | torch.Tensor]


class ImageClassifier(nn.Module):
    """A model in evaluation mode, with the normalization of its training: images to logits or probabilities.

    It is a `torch.nn.Module`: `to`, `state_dict` and `torch.compile` work as usual.

    Attributes:
        model: the trained model itself. Its inputs are normalized.
        classes: names of the classes, in the order of the logits.
        shape: channels, height and width of an image.
        mean: of each channel, in units where 255 is 1.
        std: as `mean`, the standard deviation.
        resize: height and width that `preprocess` resizes an image to cover, before it crops the center; None if
            the data set was one's own and did not declare it.
        precision: of the training: "fp32", "fp64", "bf16" or "fp16". The last two run under autocast.
        checkpoint: folder of the checkpoint.
        parallel: whether `predict` may run the model in several threads at a time, on a CPU: not one of one's own,
            whose `forward` may store values in attributes.
    """

    shift: torch.Tensor
    divisor: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        resize: tuple[int, int] | None,
        precision: str,
        dtype: torch.dtype,
        checkpoint: Path,
        parallel: bool,
    ) -> None:
        super().__init__()
        self.model, self.classes, self.shape, self.mean, self.std = model, classes, shape, mean, std
        self.resize, self.precision, self.checkpoint, self.parallel = resize, precision, checkpoint, parallel
        # Not persistent: a state dictionary has the model's entries only, as in the checkpoint.
        self.register_buffer("shift", per_channel(mean, dtype), persistent=False)
        self.register_buffer("divisor", per_channel(std, dtype), persistent=False)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits of images, of shape `(n, classes)`.

        Args:
            images: uint8, shape `(n, channels, height, width)`, 0 to 255, on the model's device.
        """
        inputs = images.to(self.shift.dtype).sub(self.shift).div(self.divisor)
        with autocast(self.precision, images.device):
            logits: torch.Tensor = self.model(inputs)
        return logits.to(self.shift.dtype)

    def predict(self, images: Images) -> torch.Tensor:
        """Returns the probabilities of the classes: the softmax of the logits.

        Those of an image do not depend on the other images, nor on the number of threads, to the last bit: each
        image passes the model alone. `hvd_adam.evaluate --predictions` computes the same. For the highest
        throughput pass batches to the model itself.

        Args:
            images: a uint8 tensor of shape `(n, channels, height, width)`, on any device; or a Pillow image or a
                sequence of them, which `preprocess` fits to the model.

        Returns:
            Floating-point tensor of shape `(n, classes)`, on the model's device.

        Raises:
            UserError: the images are of another type, dtype or shape, or cannot be fitted.
        """
        batch, device = self._batch(images), self.shift.device
        if not len(batch):
            return torch.empty(0, len(self.classes), dtype=self.shift.dtype, device=device)
        parallel = self.parallel and device.type == "cpu"
        found: torch.Tensor = one_by_one(
            lambda rows: self(rows.to(device)).softmax(dim=1), batch, parallel=parallel
        )
        return found

    def preprocess(self, image: Image) -> torch.Tensor:
        """Fits an image to the model as test images were: gray or RGB, resized, its center cropped.

        Args:
            image: of any size and mode.

        Returns:
            uint8, shape `(channels, height, width)`.

        Raises:
            UserError: it is not a Pillow image, images of this number of channels cannot be made, or the data set
                was one's own and did not declare its `resize`.
        """
        if not hasattr(image, "convert"):  # needs no Pillow, as tensors do not
            raise UserError(self._wrong_type(image))
        self.require_files()
        mode = MODES[self.shape[0]]
        image = image if image.mode == mode else image.convert(mode)
        return fit(image, self.resize or self.shape[1:], self.shape[1:])

    def require_files(self) -> str:
        """Checks that image files can be fitted to the model.

        Returns:
            Pillow's mode of the images, such as "RGB".

        Raises:
            UserError: as `preprocess`.
        """
        if self.resize is None:
            raise UserError(
                f"checkpoint {self.checkpoint}: its data set prepares images in a way of its own: pass uint8 "
                f"tensors of shape {self._batch_shape} to predict(), or train with Datasets(resize=…)"
            )
        if self.shape[0] not in MODES:
            raise UserError(
                f"checkpoint {self.checkpoint}: images have {self.shape[0]} channels, which files have not: pass "
                "uint8 tensors to predict()"
            )
        return MODES[self.shape[0]]

    def _batch(self, images: Images) -> torch.Tensor:
        """Returns uint8 images as one tensor."""
        if not isinstance(images, torch.Tensor):
            several = images if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
            fitted = [
                self._checked(one) if isinstance(one, torch.Tensor) else self.preprocess(one) for one in several
            ]
            images = torch.stack(fitted) if fitted else torch.empty(0, *self.shape, dtype=torch.uint8)
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            hint = "; for one image pass image[None]" if images.shape == self.shape else ""
            raise UserError(
                f"images are {images.dtype} of shape {tuple(images.shape)}: they must be torch.uint8 of shape "
                f"{self._batch_shape}{hint}"
            )
        return images

    def _checked(self, image: torch.Tensor) -> torch.Tensor:
        """Returns one image of a sequence."""
        if image.dtype != torch.uint8 or image.shape != self.shape:
            raise UserError(
                f"an image of the sequence is {image.dtype} of shape {tuple(image.shape)}: it must be torch.uint8 "
                f"of shape {self.shape}"
            )
        return image

    def _wrong_type(self, value: object) -> str:
        """Returns the message for what is neither a Pillow image nor a tensor."""
        if isinstance(value, str | bytes | Path):
            return f"images have {shown(repr(value))}, which is not an image: open files with PIL.Image.open"
        kind = type(value).__name__
        if kind == "ndarray":
            return (
                f"images have a NumPy array: make uint8 tensors of shape {self._batch_shape} with torch.from_numpy"
            )
        return (
            f"images have a value of type {kind}: pass a Pillow image, a list of them, or a uint8 tensor of shape "
            f"{self._batch_shape}"
        )

    @property
    def _batch_shape(self) -> str:
        """The shape of a batch, for messages."""
        return f"(n, {', '.join(map(str, self.shape))})"
