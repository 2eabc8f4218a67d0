"""`NoiseMeter`: measures the gradient noise scale in some updates, from gradients that are there anyway."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.grad_scaling import square_norm
from hvd_adam.distributed.noise.estimate import STATE_LENGTH, NoiseEstimate, RunningEstimate
from hvd_adam.distributed.noise.preconditioner import Gradient, Preconditioner
from hvd_adam.distributed.noise.words import WORDS, decode, encode
from hvd_adam.optim.memory import memory_order

_logger = logging.getLogger("hvd_adam")

GRADIENT, ADAM = FORMS = ("gradient", "adam")


class NoiseMeter:
    """The noise scale of the gradients that an optimizer averages; see `RunningEstimate`.

    Before its gradients are averaged, each rank computes ‖g_i‖² of its own, over all micro-batches of the update,
    and sends it with the flags of the last bucket. The ranks are the shares. On one rank the micro-batches are: S
    is then ‖g₁‖² of the first one alone, which has the same expectation.

    The form is "gradient", or with a preconditioner "adam": gradients are divided by Adam's √v̂ + ε. If the state
    is sharded, a rank does so with its own shard only, and S is the sum over the ranks instead of the mean. It has
    the same expectation, since the gradients of all ranks have the same distribution, and a larger variance.

    An update does not count if a rank has no gradient, if its gradients were averaged more than once (several
    backward passes without `no_sync`), or if they are not finite. Shares must have equal numbers of samples.

    Args:
        every: measure in the first update, and in every `every`-th after it. None: never.
        rank: of this process.
        ranks: number of ranks.
        accumulate: micro-batches per update.
        preconditioner: of the form "adam".

    Attributes:
        length: number of words that travel with the gradients.
        form: "gradient" or "adam".
        shard: (rank, ranks): this rank measures the rank-th part of each bucket of its own gradients. (0, 1): all.
        record_skip: called before step counts are read, since a device may have skipped the last update.
    """

    record_skip: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        every: int | None,
        rank: int = 0,
        ranks: int = 1,
        accumulate: int = 1,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self._every, self._rank, self._ranks = every, rank, ranks
        self._preconditioner = preconditioner
        self.form = GRADIENT if preconditioner is None else ADAM
        self.shard = (0, 1) if preconditioner is None else preconditioner.shard
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
        self._has_gradient = False
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
        self._own, self._mean, self._has_gradient = [], [], False
        if self._preconditioner is not None:
            self.record_skip()
            self._preconditioner.begin()

    def square_norm(self, gradients: Iterable[Gradient], device: torch.device) -> Tensor:
        """Returns the squared norm of gradients in the meter's form, 0-dim float64, without waiting for them."""
        if self._preconditioner is not None:
            return self._preconditioner.square_norm(gradients, device)
        return square_norm([gradient.elements for gradient in gradients] or [torch.empty(0, device=device)])

    def add_own(self, square: Tensor, *, has_gradient: bool) -> None:
        """Adds the squared norm of a part of this rank's own gradient, and whether the rank has any of it."""
        self._own.append(square)
        self._has_gradient |= has_gradient

    def add_mean(self, square: Tensor) -> None:
        """Adds the squared norm of a part of the averaged gradient."""
        self._mean.append(square)

    def words(self) -> Tensor:
        """Returns what travels with the gradients, from all parts of this rank's own; `length` elements."""
        own = torch.stack(self._own).sum()
        in_parts = self.shard[1] > 1  # which may be empty
        return encode(own if self._has_gradient else own * math.nan, self._rank, self._ranks, zero_counts=in_parts)

    def mean(self) -> Tensor:
        """Returns the squared norm of the averaged gradient, or of this rank's part of it; shape (1,), float32."""
        return torch.stack(self._mean).sum().float().reshape(1)

    def receive(self, words: Sequence[float], mean: float) -> None:
        """Ends a round.

        Args:
            words: the sum of the words of all ranks.
            mean: the squared norm of the whole averaged gradient.
        """
        numbers = decode(words)
        self._received.append((math.fsum(numbers) if self.shard[1] > 1 else fmean(numbers), mean))

    # Called on one rank.

    def begin_on_one_rank(self, parameters: Sequence[Tensor]) -> None:
        """Called after the backward pass of the first micro-batch."""
        if self.due:
            self.begin_round()
            self.add_own(self._square_norm_of(parameters), has_gradient=True)

    def end_on_one_rank(self, parameters: Sequence[Tensor]) -> None:
        """Called when gradients are the mean over the micro-batches. Waits for the device."""
        if self.due and self._own:
            self._received.append((self._own[0].item(), self._square_norm_of(parameters).item()))
            self._own = []

    def _square_norm_of(self, parameters: Sequence[Tensor]) -> Tensor:
        found = [Gradient(p, _in_memory_order(p, p.grad)) for p in parameters if p.grad is not None]
        return self.square_norm(found, parameters[0].device)

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
            if own > 0:  # else no gradient, or none that Adam's v is known for
                self._estimate.add(own * factor, mean * factor, self._shares)
        self._forget()
        self._updates = (self._updates + 1) % self._every

    # Checkpoints.

    def state(self) -> list[float]:
        """Returns numbers from which `load_state` continues exactly, identical on all ranks; none if it is off."""
        if self._every is None:
            return []
        return [float(self._updates), *self._estimate.state(), float(FORMS.index(self.form))]

    def load_state(self, saved: Sequence[float]) -> None:
        """Continues from what `state` returned, of the same global batch. The number of ranks may be another.

        Every rank must call it with the same numbers, before an update. If there are none, nothing changes. If
        they are of the other form, or of an earlier version, the same updates are measured, for a new estimate.
        """
        if not saved:
            return
        self._updates = int(saved[0]) % (self._every or 1)
        *estimate, form = saved[1:]
        reason = "an earlier version saved it"
        if len(estimate) == STATE_LENGTH:
            reason = f"the form was {FORMS[int(form)]!r}, and is {self.form!r} now"
            if FORMS[int(form)] == self.form:
                self._estimate.load_state(estimate)
                return
        self._estimate = RunningEstimate()
        if self._every is not None:
            _logger.info(f"noise scale: {reason}: the estimate restarts")


def meter_of(
    optimizer: torch.optim.Optimizer,
    every: int | None,
    form: str,
    accumulate: int,
    shard: tuple[int, int],
) -> NoiseMeter:
    """Returns the meter of an optimizer.

    Args:
        optimizer: the optimizer, an Adam.
        every: as in `NoiseMeter`.
        form: "gradient" or "adam".
        accumulate: micro-batches per update.
        shard: as in `Preconditioner`.
    """
    preconditioner = Preconditioner(optimizer, shard) if form == ADAM else None
    return NoiseMeter(every, int(horovod().rank()), int(horovod().size()), accumulate, preconditioner)


def _in_memory_order(p: Tensor, grad: Tensor) -> Tensor:
    """Returns the elements of a gradient in the order of the state of its parameter, 1-dimensional."""
    dense = (
        grad if grad.stride() == torch.empty_like(p, device="meta").stride() else torch.empty_like(p).copy_(grad)
    )
    return memory_order(dense, 0, p.numel())
