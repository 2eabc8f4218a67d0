"""`Normalization`: uint8 images on the device into normalized floating-point images."""

import torch


class Normalization:
    """Subtracts each channel's mean and divides by its standard deviation.

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
        self._device, self._dtype, self._memory_format = device, dtype, memory_format
        # Half precision would lose the last bits of 0 to 255 in the subtraction, so the conversion is last.
        self._working_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._shift, self._divisor = self._per_channel(mean), self._per_channel(std)

    def _per_channel(self, values: tuple[float, ...]) -> torch.Tensor:
        scaled = torch.tensor(values, dtype=torch.float64, device="cpu") * 255
        return scaled.to(self._device, self._working_dtype).view(1, -1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the normalized images.

        Args:
            images: uint8, shape `(n, c, h, w)`.
        """
        values = images.to(self._working_dtype, memory_format=self._memory_format)
        return values.sub_(self._shift).div_(self._divisor).to(self._dtype)
