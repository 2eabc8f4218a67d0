"""`OuterWeights`: the weights on which all islands agree, and the outer step that changes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class OuterWeights:
    """The weights at the last meeting, and the momentum of the outer optimizer.

    The outer optimizer is SGD with Nesterov momentum (DiLoCo, arXiv 2311.08105, algorithm 1), in the form of
    `torch.optim.SGD(nesterov=True)`. With Δ, the mean over the islands of outer minus local weights:

        m ← μ·m + Δ,  θ ← θ − lr·(Δ + μ·m)

    Args:
        parameters: of one dtype and device, in the order of the flat vectors.
        lr: learning rate of the outer step.
        momentum: μ.

    Attributes:
        values: [n], the outer weights of all parameters one after the other.
        momentum: [n], m.
    """

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float) -> None:
        self._parameters, self._lr, self._mu = parameters, lr, momentum
        self.values = self.local()
        self.momentum = torch.zeros_like(self.values)

    def local(self) -> Tensor:
        """Returns a copy of this island's own weights, [n]."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters])

    def difference(self) -> Tensor:
        """Returns outer minus local weights, [n]."""
        return self.values - self.local()

    def step(self, mean: Tensor) -> None:
        """Makes the outer step.

        Args:
            mean: Δ; identical on all ranks. It is overwritten.
        """
        self.momentum.mul_(self._mu).add_(mean)
        self.values.sub_(mean.add_(self.momentum, alpha=self._mu), alpha=self._lr)

    def write(self, values: Tensor | None = None) -> None:
        """Gives the parameters the outer weights, or other ones, [n]."""
        values = self.values if values is None else values
        pieces = torch.split(values, [p.numel() for p in self._parameters])
        with torch.no_grad():
            for p, piece in zip(self._parameters, pieces, strict=True):
                p.copy_(piece.view_as(p))
