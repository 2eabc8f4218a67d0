"""The parameters that `bench adam` updates: with the shapes of a model, or in one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvd_adam.bench.config import CUSTOM, MASTER, AdamConfig, flat_elements
from hvd_adam.models.torchvision_compat import import_torchvision

Shape = tuple[int, ...]

# Width and depth of GPT-3 XL (Brown et al., arXiv 2005.14165, table 2.1) with GPT-2's vocabulary. The output
# layer is tied to the embedding: 1.316 G parameters.
LAYERS, WIDTH, VOCABULARY, CONTEXT = 24, 2048, 50257, 2048


@dataclass(frozen=True)
class Workload:
    """A list of parameters to update.

    Attributes:
        name: as in --workloads, or "custom".
        dtype_name: as in --dtype.
        shapes: shapes of the tensors.
        device: device of the tensors.
    """

    name: str
    dtype_name: str
    shapes: tuple[Shape, ...]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and gradients."""
        dtype: torch.dtype = getattr(torch, self.dtype_name.removesuffix(MASTER))
        return dtype

    @property
    def master(self) -> bool:
        """Whether float32 master weights are updated."""
        return self.dtype_name.endswith(MASTER)

    @property
    def parameters(self) -> int:
        """The number of parameters in all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def moved(self) -> int:
        """Bytes that a step must read and write: it reads the gradient, and reads and writes everything else."""
        size = self.dtype.itemsize
        state = 3 * torch.float32.itemsize if self.master else 2 * size  # both moments and the master weights
        return self.parameters * (2 * (size + state) + size)


def shapes(config: AdamConfig, name: str) -> tuple[Shape, ...]:
    """Returns the shapes of a workload's tensors, in the order of the model."""
    if name == CUSTOM:
        return tuple((size,) for size in config.tensor_sizes() or ())
    elements = flat_elements(name)
    if elements is not None:
        return ((1, elements),)  # a matrix: only those have their state in few bits
    if name == "transformer":
        return (*_transformer(),)
    models = import_torchvision().models
    with torch.device("meta"):
        return tuple(tuple(parameter.shape) for parameter in getattr(models, name)().parameters())


def _transformer() -> Iterator[Shape]:
    """Yields the shapes of GPT-2: two embeddings; norm, attention, norm and MLP per layer; a last norm."""
    norm = ((WIDTH,), (WIDTH,))
    yield from ((VOCABULARY, WIDTH), (CONTEXT, WIDTH))
    for _ in range(LAYERS):
        yield from norm
        yield from ((3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
        yield from norm
        yield from ((4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    yield from norm
