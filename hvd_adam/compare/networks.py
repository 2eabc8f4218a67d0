"""The models that runs train: --model, or a deep network of the study "vanishing", and their initial weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from hvd_adam.compare.cells import Cell
from hvd_adam.data import ImageData
from hvd_adam.models import zoo

WIDTH = 64  # of each hidden layer of a deep network

# Activation, normalization, residual connections and initialization of each deep network.
DEEP: dict[str, tuple[type[nn.Module], bool, bool, str]] = {
    "sigmoid": (nn.Sigmoid, False, False, "default"),
    "tanh": (nn.Tanh, False, False, "default"),
    "relu": (nn.ReLU, False, False, "default"),
    "relu, He": (nn.ReLU, False, False, "he"),
    "relu, norm": (nn.ReLU, True, False, "default"),
    "gelu, norm, residual": (nn.GELU, True, True, "default"),
}


class Block(nn.Module):
    """One hidden layer: normalization, a linear map and the activation, around which the input may be added."""

    def __init__(self, activation: type[nn.Module], norm: bool, residual: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(WIDTH) if norm else nn.Identity(), nn.Linear(WIDTH, WIDTH), activation()
        )
        self.residual = residual

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns features of the shape of the input, `(n, WIDTH)`."""
        changed: torch.Tensor = self.layers(features)
        return features + changed if self.residual else changed


def deep_network(kind: str, depth: int, data: ImageData) -> nn.Module:
    """Returns a perceptron with `depth` hidden layers of `WIDTH` units.

    Args:
        kind: of `DEEP`.
        depth: number of hidden layers, ≥ 2.
        data: the images and classes.
    """
    activation, norm, residual, initialization = DEEP[kind]
    pixels = data.channels * data.image_size[0] * data.image_size[1]
    blocks = [Block(activation, norm, residual) for _ in range(depth - 1)]
    first = [nn.Flatten(), nn.Linear(pixels, WIDTH), activation()]
    model = nn.Sequential(*first, *blocks, nn.Linear(WIDTH, len(data.classes)))
    INITIALIZATIONS[initialization](model)
    return model


def build(cell: Cell, model: str, depth: int, data: ImageData) -> nn.Module:
    """Builds the model of a run with its initial weights, from the run's seed.

    Args:
        cell: the run.
        model: --model.
        depth: --depth.
        data: the images and classes.

    Raises:
        UserError: no model has that name, or it does not fit the images.
    """
    torch.manual_seed(cell.seed)
    if cell.network:
        return deep_network(cell.network, depth, data)
    built: nn.Module = zoo.build(model, sample_shape=data.sample_shape, num_classes=len(data.classes))
    INITIALIZATIONS[cell.initialization](built)
    return built


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weight tensors of the layers, from input to output, without biases and normalization."""
    return [parameter for parameter in model.parameters() if parameter.ndim >= 2]


def _scaled(factor: float) -> Callable[[nn.Module], None]:
    def initialize(model: nn.Module) -> None:
        with torch.no_grad():
            for weight in weights(model):
                weight.mul_(factor)

    return initialize


def _zeros(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def _he(model: nn.Module) -> None:
    """He et al., arXiv 1502.01852, equation 10: variance 2/fan-in, biases 0."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# Initial weights: PyTorch's own, those times a factor, zeros, and He's.
INITIALIZATIONS: dict[str, Callable[[nn.Module], None]] = {
    "default": lambda model: None,
    "he": _he,
    "zeros": _zeros,
    "too small": _scaled(0.01),
    "too large": _scaled(10.0),
}
