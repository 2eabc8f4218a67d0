"""`Normalization`: uint8 images on the device into normalized floating-point images."""

import math
import mmap

import torch

from hvd_adam.errors import UserError
from hvd_adam.optim.memory import any_is_held

_MAPPED_BYTES = 2**20
_MOST_REUSED = 3  # of the batches that a loop holds at a time; others have pages that are freed with them


def per_channel(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """Returns a statistic of each channel in units of uint8 pixels, shape `(1, c, 1, 1)`, on the CPU.

    Args:
        values: of each channel, in units where 255 is 1.
        dtype: of the result.
    """
    scaled = torch.tensor(values, dtype=torch.float64, device="cpu") * 255
    return scaled.to(dtype).view(1, -1, 1, 1)


class Normalization:
    """Subtracts each channel's mean and divides by its standard deviation.

    Large batches on a CPU lie in memory of their own, which a later batch takes over when nothing holds the
    earlier one. The C library takes new pages for each block above 32 MB, which cost more time than the
    arithmetic. In its heap, batches from worker processes leave holes that no later batch fits into: 19 MB more
    with each batch of 32 images of 224 pixels.

    Args:
        mean: of each channel, in units where 255 is 1.
        std: as `mean`, the standard deviation.
        device: of the images.
        dtype: of the result, floating-point.
        memory_format: of the result.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
    ) -> None:
        self._memory: list[torch.Tensor] = []
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        self._on_cpu = device.type == "cpu"
        # Half precision would lose the last bits of 0 to 255 in the subtraction, so the conversion is last.
        self._working_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._shift, self._divisor = (
            per_channel(values, self._working_dtype).to(device) for values in (mean, std)
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the normalized images.

        Args:
            images: uint8, shape `(n, c, h, w)`.

        Raises:
            UserError: the statistics are not those of such images.
        """
        count = self._shift.numel()
        if images.dim() != 4 or count not in (1, images.shape[1]):
            raise UserError(
                f"mean and std of the data set have {count} values, but its uint8 inputs have shape "
                f"{tuple(images.shape[1:])}: they need one value per channel of inputs (channels, height, width)"
            )
        values, shift, divisor = self._empty(images.shape), self._shift, self._divisor
        if self._on_cpu and self._memory_format == torch.channels_last:
            # PyTorch's innermost loop would be over the few channels. Here it is over the pixels of a channel, and
            # in the subtraction and division over whole rows.
            for channel, source in zip(values.unbind(1), images.unbind(1), strict=True):
                channel.copy_(source)
            shift, divisor = (
                tensor.expand(-1, -1, -1, images.shape[3]).contiguous(memory_format=torch.channels_last)
                for tensor in (shift, divisor)
            )
        else:
            values.copy_(images)
        return values.sub_(shift).div_(divisor).to(self._dtype)

    def _empty(self, shape: torch.Size) -> torch.Tensor:
        """Returns memory for a batch in the working dtype."""
        size = math.prod(shape) * self._working_dtype.itemsize
        if not self._on_cpu or size < _MAPPED_BYTES:
            return torch.empty(
                shape, dtype=self._working_dtype, device=self._device, memory_format=self._memory_format
            )
        flat = self._free_memory(size)
        if self._memory_format == torch.channels_last:
            count, channels, height, width = shape
            return flat.view(count, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(shape)

    def _free_memory(self, size: int) -> torch.Tensor:
        """Returns memory of `size` bytes that no batch uses any more; its pages are new if there is none."""
        self._memory = [memory for memory in self._memory if memory.nbytes == size][-_MOST_REUSED:]
        free = next((i for i in range(len(self._memory)) if not any_is_held([self._memory[i]])), None)
        if free is not None:
            return self._memory[free]
        # Private: processes that are forked must not write into it.
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=self._working_dtype)
        self._memory.append(memory)
        return memory
