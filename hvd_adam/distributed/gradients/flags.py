"""Flags and message that buckets carry next to their gradients, and how they are read when a round ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer

Located = tuple[GradientBuffer, Bucket]  # a bucket, and the buffer that it is part of


class Reduced(NamedTuple):
    """The result of one round of reductions.

    Attributes:
        message: the sum of the messages of all ranks.
        total: 0-dimensional float64, or None: 0 if all elements of the gradients are finite, else NaN, and that
            on all ranks or on none.
    """

    message: list[float]
    total: Tensor | None


def flags_of(buffer: GradientBuffer, bucket: Bucket) -> Tensor:
    """Returns the elements of a bucket that flag which of its parameters have gradients."""
    return buffer.grad[bucket.flags : bucket.flags + bucket.last - bucket.first]


def message_of(buffer: GradientBuffer, bucket: Bucket, length: int) -> Tensor:
    """Returns the elements of a bucket that hold the message."""
    return buffer.grad[bucket.control : bucket.control + length]


def finite_or_nan(total: Tensor) -> Tensor:
    """Returns 0 or NaN as a message of one element, float32 on the CPU."""
    return total.float().cpu().reshape(1)


def read_flags(buckets: Sequence[Located], length: int) -> tuple[list[list[bool]], list[float]]:
    """Reads what buckets carry next to their sums, and clears the message.

    Args:
        buckets: all, the first of which has the message.
        length: of the message.

    Returns:
        For each parameter of each bucket whether a rank has a gradient; the message.
    """
    flags = [flags_of(buffer, bucket) for buffer, bucket in buckets]
    place = message_of(*buckets[0], length)
    small = torch.cat([values.float() for values in (*flags, place)]).cpu()
    *counts, received = torch.split(small, [*map(len, flags), length])
    place.zero_()
    return [(count > 0).tolist() for count in counts], received.tolist()
