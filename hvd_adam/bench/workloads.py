"""What `bench adam` updates: lists of parameters as models have them, or in one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hvd_adam.bench.config import CUSTOM, MASTER, AdamConfig, flat_elements
from hvd_adam.models.torchvision_compat import import_torchvision

Shape = tuple[int, ...]

# GPT-3 XL's width and depth with GPT-2's vocabulary (Brown et al., arXiv 2005.14165, table 2.1), the output tied
# to the embedding: 1.316 G parameters.
LAYERS, WIDTH, VOCABULARY, CONTEXT = 24, 2048, 50257, 2048


@dataclass(frozen=True)
class Workload:
    """A list of parameters to update.

    Attributes:
        name: as in --workloads, or "custom".
        kind: as in --dtype.
        shapes: of the tensors.
        device: where they lie.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """That of parameters and gradients."""
        return getattr(torch, self.kind.removesuffix(MASTER))

    @property
    def master(self) -> bool:
        """Whether float32 copies of the parameters are what is updated."""
        return self.kind.endswith(MASTER)

    @property
    def parameters(self) -> int:
        """How many there are in all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def moved(self) -> int:
        """Bytes that a step must read and write: all that it keeps, but for the gradient, which it only reads."""
        size = self.dtype.itemsize
        state = 3 * torch.float32.itemsize if self.master else 2 * size  # both moments, and the master weights
        return self.parameters * (2 * (size + state) + size)


def shapes(config: AdamConfig, name: str) -> tuple[Shape, ...]:
    """Those of the tensors of a workload, in the order of the model."""
    if name == CUSTOM:
        return tuple((size,) for size in config.tensor_sizes() or ())
    elements = flat_elements(name)
    if elements is not None:
        return ((elements,),)
    if name == "transformer":
        return (*_transformer(),)
    models = import_torchvision().models
    with torch.device("meta"):
        return tuple(tuple(parameter.shape) for parameter in getattr(models, name)().parameters())


def _transformer() -> Iterator[Shape]:
    """GPT-2's tensors: two embeddings, then of each layer norm, attention, norm and MLP, and a last norm."""
    norm = ((WIDTH,), (WIDTH,))
    yield from ((VOCABULARY, WIDTH), (CONTEXT, WIDTH))
    for _ in range(LAYERS):
        yield from norm
        yield from ((3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
        yield from norm
        yield from ((4 * WIDTH, WIDTH), (4 * WIDTH,), (WIDTH, 4 * WIDTH), (WIDTH,))
    yield from norm
