"""Outputs that do not depend on which other samples are in the batch, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Matrix products and convolutions use other kernels, with another order of additions, for other sizes of the
# batch, and share the rows of some sizes unequally among threads. With 16 rows, outputs depend neither on the
# place in the batch nor on the number of threads. One image alone takes the time of 16.
ROWS = 16


def in_fixed_batches(forward: Callable[[torch.Tensor], Any], inputs: torch.Tensor) -> Any:
    """Returns the outputs of a model in evaluation mode, computed in batches of exactly `ROWS` samples.

    Args:
        forward: maps samples to outputs, each of which depends on its own sample only.
        inputs: shape `(samples, …)`. The last batch is filled up with zeros.

    Returns:
        The outputs, of shape `(samples, …)`. If `forward` returns no tensor, what it returns of all inputs.
    """
    outputs = []
    for part in torch.split(inputs, ROWS):
        missing = ROWS - len(part)
        rows = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        output = forward(rows)
        if not isinstance(output, torch.Tensor):
            return forward(inputs)
        outputs.append(output[: len(part)])
    return torch.cat(outputs)
