"""`Normalization`: uint8 images on the device into normalized floating-point images."""

import math
import mmap

import torch

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

    Args:
        mean: of each channel, in units where 255 is 1.
        std: as `mean`, the standard deviation.
        device: of the images.
        dtype: of the result, floating-point.
        memory_format: of the result.
        from_workers: whether the images come from worker processes. Large batches on a CPU then lie in memory of
            their own, which a later batch takes over when nothing holds the earlier one: in the heap of the C
            library they leave holes that no later batch fits into, 19 MB more with each batch of 32 images of
            224 pixels.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format,
        *,
        from_workers: bool = False,
    ) -> None:
        self._reuses_memory = from_workers and device.type == "cpu"
        self._memory: list[torch.Tensor] = []
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        # Half precision would lose the last bits of 0 to 255 in the subtraction, so the conversion is last.
        self._working_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._shift, self._divisor = (
            per_channel(values, self._working_dtype).to(device) for values in (mean, std)
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the normalized images.

        Args:
            images: uint8, shape `(n, c, h, w)`.
        """
        values = self._empty(images.shape).copy_(images)
        return values.sub_(self._shift).div_(self._divisor).to(self._dtype)

    def _empty(self, shape: torch.Size) -> torch.Tensor:
        """Returns memory for a batch in the working dtype."""
        size = math.prod(shape) * self._working_dtype.itemsize
        if not self._reuses_memory or size < _MAPPED_BYTES:
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
        memory = torch.frombuffer(mmap.mmap(-1, size), dtype=self._working_dtype)
        self._memory.append(memory)
        return memory
