"""`NoiseMeter`: measures the gradient noise scale in some updates, from gradients that are there anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.grad_scaling import square_norm
from hvd_adam.distributed.noise.estimate import NoiseEstimate, RunningEstimate
from hvd_adam.distributed.noise.words import WORDS, decode, encode


class NoiseMeter:
    """The noise scale of the gradients that an optimizer averages; see `RunningEstimate`.

    Before its gradients are averaged, each rank computes ‖g_i‖² of its own, over all micro-batches of the update,
    and sends it with the flags of the last bucket. The ranks are the shares. On one rank the micro-batches are: S
    is then ‖g₁‖² of the first one alone, which has the same expectation. Gradients are those of the loss, not
    divided by Adam's √v̂.

    An update does not count if a rank has no gradient, if its gradients were averaged more than once (several
    backward passes without `no_sync`), or if they are not finite. Shares must have equal numbers of samples.

    Args:
        every: measure in the first update, and in every `every`-th after it. None: never.
        rank: of this process.
        ranks: number of ranks.
        accumulate: micro-batches per update.

    Attributes:
        length: number of words that travel with the gradients.
    """

    def __init__(self, every: int | None, rank: int = 0, ranks: int = 1, accumulate: int = 1) -> None:
        self._every, self._rank, self._ranks = every, rank, ranks
        self._shares = ranks if ranks > 1 else accumulate
        self.length = ranks * WORDS if every is not None and ranks > 1 else 0
        self._estimate = RunningEstimate()
        self._updates = 0  # since the last measured one
        self._forget()

    @property
    def due(self) -> bool:
        """Whether this update is measured."""
        return self._every is not None and self._updates == 0

    def _forget(self) -> None:
        self._own: list[Tensor] = []
        self._mean: list[Tensor] = []
        self._received: list[tuple[float, float]] = []  # S and L of each round of this update
        self._unscale: float | Tensor = 1.0

    def estimate(self) -> NoiseEstimate | None:
        """Returns the noise scale, identical on all ranks; None before the fifth measured update."""
        return self._estimate.read()

    def metrics(self, global_batch: int) -> dict[str, float | None]:
        """Returns the noise scale and its interval in samples, by name of a metric; nothing if it is not measured.

        Args:
            global_batch: samples of an update.

        Returns:
            "noise_scale", "noise_scale_low" and "noise_scale_high"; None for what is infinite, or not known yet.
        """
        if self._every is None:
            return {}
        values = self._estimate.read() or NoiseEstimate(math.inf, math.inf, math.inf)
        names = ("noise_scale", "noise_scale_low", "noise_scale_high")
        scaled = (value * global_batch if math.isfinite(value) else None for value in values)
        return dict(zip(names, scaled, strict=True))

    # Called while gradients are averaged, in updates that are due.

    def begin_round(self) -> None:
        """Called before the first bucket of a round is sent."""
        self._own, self._mean = [], []

    def add_own(self, square: Tensor) -> None:
        """Adds the squared norm of a part of this rank's own gradient."""
        self._own.append(square)

    def add_mean(self, square: Tensor) -> None:
        """Adds the squared norm of a part of the averaged gradient."""
        self._mean.append(square)

    def words(self) -> Tensor:
        """Returns what travels with the gradients, from all parts of this rank's own; `length` elements."""
        return encode(torch.stack(self._own).sum(), self._rank, self._ranks)

    def mean(self) -> Tensor:
        """Returns the squared norm of the averaged gradient, or of this rank's part of it; shape (1,), float32."""
        return torch.stack(self._mean).sum().float().reshape(1)

    def receive(self, words: Sequence[float], mean: float) -> None:
        """Ends a round.

        Args:
            words: the sum of the words of all ranks.
            mean: the squared norm of the whole averaged gradient.
        """
        self._received.append((fmean(decode(words)), mean))

    # Called on one rank.

    def begin_on_one_rank(self, parameters: Sequence[Tensor]) -> None:
        """Called after the backward pass of the first micro-batch."""
        if self.due:
            self.begin_round()
            self.add_own(square_norm([p.grad for p in parameters if p.grad is not None]))

    def end_on_one_rank(self, parameters: Sequence[Tensor]) -> None:
        """Called when gradients are the mean over the micro-batches. Waits for the device."""
        if self.due and self._own:
            mean = square_norm([p.grad for p in parameters if p.grad is not None])
            self._received.append((self._own[0].item(), mean.item()))
            self._own = []

    # Called by the step.

    def unscale(self, factor: float | Tensor) -> None:
        """Receives the inverse of the loss scale of the gradients that were averaged."""
        self._unscale = factor

    def updated(self) -> None:
        """Called after each update."""
        if self._every is None:
            return
        if self.due and len(self._received) == 1:
            (own, mean), factor = self._received[0], float(self._unscale) ** 2
            self._estimate.add(own * factor, mean * factor, self._shares)
        self._forget()
        self._updates = (self._updates + 1) % self._every

    # Checkpoints.

    def state(self) -> list[float]:
        """Returns numbers from which `load_state` continues exactly, identical on all ranks; none if it is off."""
        return [] if self._every is None else [float(self._updates), *self._estimate.state()]

    def load_state(self, saved: Sequence[float]) -> None:
        """Continues from what `state` returned, of the same global batch. The number of ranks may be another.

        Every rank must call it with the same numbers, before an update. If there are none, nothing changes.
        """
        if not saved:
            return
        self._updates = int(saved[0]) % (self._every or 1)
        self._estimate.load_state(saved[1:])
