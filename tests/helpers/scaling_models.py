"""Models of `scaling_validation.py` for images of 3x32x32: of several buckets, of one, and of attention."""

import torch
from torch import Tensor, nn


def mlp(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Returns 4.5 million parameters in two buckets, which compute little."""
    inputs = in_channels * image_size[0] * image_size[1]
    layers = (nn.Linear(inputs, 1024), nn.ReLU(), nn.Linear(1024, 1280), nn.ReLU(), nn.Linear(1280, num_classes))
    return nn.Sequential(nn.Flatten(), *layers)


class Transformer(nn.Module):
    """Patches of 4x4, four layers of attention without dropout, and a linear layer of their mean."""

    WIDTH, PATCH = 256, 4

    def __init__(self, in_channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, self.WIDTH, self.PATCH, self.PATCH)
        count = image_size[0] * image_size[1] // self.PATCH**2
        self.positions = nn.Parameter(torch.zeros(count, self.WIDTH))
        layer = nn.TransformerEncoderLayer(self.WIDTH, 4, 4 * self.WIDTH, 0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.last = nn.Linear(self.WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.last(self.layers(tokens).mean(dim=1))


def transformer(in_channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Returns a `Transformer` of 3.2 million parameters in two buckets."""
    return Transformer(in_channels, num_classes, image_size)
