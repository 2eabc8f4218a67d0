"""`MixupLoader`: training batches of mixed samples (`--mixup`; Zhang et al. 2018, arXiv 1710.09412)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from hvd_adam.data import sampling
from hvd_adam.data.protocols import Batch, Data, Loader
from hvd_adam.errors import UserError

_PARTNERS = 2**63  # added to the seed: no run has such a seed, so no order is used twice


class MixupLoader:
    """Mixes each training sample with a partner: λ · sample + (1 − λ) · partner, inputs and targets with one λ.

    The partners are a second, independent order of all samples, with their own augmentation, and λ is drawn from
    Beta(α, α) for each position of the global batch. So the mixture does not depend on the number of ranks and
    micro-batches. The price is that two samples are loaded for each position; partners within the batch would
    often lie on another rank.

    Args:
        loader: of the batches to mix; its test batches are passed on.
        partners: another one of the same data; the same one, if two iterations over it do not disturb each other.
        alpha: α > 0. The smaller, the more mixtures are close to one of the two samples.

    Attributes:
        data: as `Loader`.
        device: as `Loader`.
        dtype: as `Loader`.
    """

    def __init__(self, loader: Loader, partners: Loader, alpha: float) -> None:
        self._loader, self._partners, self._alpha = loader, partners, alpha
        self.data: Data = loader.data
        self.device, self.dtype = loader.device, loader.dtype

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """As `Loader`."""
        return self._loader.statistics

    def description(self) -> dict[str, Any]:
        """As `Loader`."""
        return self._loader.description()

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """As `Loader`."""
        return self._loader.steps_per_epoch(global_batch_size)

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """As `Loader`."""
        return self._loader.test_batches(batch_size, rank=rank, size=size)

    def train_batches(
        self,
        seed: int,
        epoch: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> Iterator[Batch]:
        """As `Loader`; targets are soft: see `mix`."""
        part: dict[str, int] = {"rank": rank, "size": size, "accumulate": accumulate}
        samples, partners = (
            source.train_batches(start, epoch, global_batch_size=global_batch_size, first_step=first_step, **part)
            for source, start in ((self._loader, seed), (self._partners, seed + _PARTNERS))
        )
        for step in range(first_step, self.steps_per_epoch(global_batch_size)):
            weights = sampling.mixup_weights(seed, epoch, step, global_batch_size, self._alpha)
            for micro_batch in range(accumulate):
                own = weights[sampling.share(global_batch_size, micro_batch=micro_batch, **part)]
                yield self.mix(next(samples), next(partners), torch.from_numpy(own))

    def mix(self, samples: Batch, partners: Batch, weights: torch.Tensor) -> Batch:
        """Returns mixed inputs and targets.

        Args:
            samples: floating-point inputs; targets are floating-point, or int64 labels of shape (n,).
            partners: as `samples`.
            weights: λ of each sample, in [0, 1], shape (n,).

        Returns:
            Inputs, and targets of the loader's dtype: labels become probabilities of shape (n, classes).

        Raises:
            UserError: inputs or targets cannot be mixed.
        """
        inputs = [batch[0] for batch in (samples, partners)]
        if not inputs[0].is_floating_point():
            raise UserError(f"--mixup mixes floating-point inputs, not {inputs[0].dtype}: leave it out")
        weights = weights.to(self.dtype).to(self.device)
        return _mixed(inputs[0], inputs[1], weights), _mixed(
            self._soft(samples[1]), self._soft(partners[1]), weights
        )

    def _soft(self, targets: torch.Tensor) -> torch.Tensor:
        if targets.is_floating_point():
            return targets.to(self.dtype)
        if targets.ndim != 1 or targets.dtype != torch.int64 or not self.data.classes:
            raise UserError(
                f"--mixup mixes labels of classes and floating-point targets, not targets of shape "
                f"{tuple(targets.shape)} and dtype {targets.dtype}: leave it out"
            )
        return F.one_hot(targets, len(self.data.classes)).to(self.dtype)


def _mixed(first: torch.Tensor, second: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weights = weights.view(-1, *[1] * (first.ndim - 1))
    return (weights * first + (1 - weights) * second).to(first.dtype)
