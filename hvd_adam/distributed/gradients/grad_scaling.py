"""Mean, loss scale and clipping as one factor of the gradients, and the decision to skip an update."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NORM_ELEMENTS = 1 << 18  # the norm of a float32 tensor is computed from pieces of this size, for precision

# For each loss scaler the optimizers that were given it.
_sharing: weakref.WeakKeyDictionary[Any, weakref.WeakSet[GradScaling]] = weakref.WeakKeyDictionary()


class GradScaling:
    """Computes the factor by which an update multiplies the reduced gradients, and finds updates to skip.

    An update is skipped if an element of the averaged gradient is infinite or NaN. One number shows that, the
    `finite_probe`: the norm of the gradient where it is needed anyway, else the sum of all elements. It is not
    finite if any element is not.

    Args:
        max_grad_norm: largest 2-norm of the averaged gradient, or None.
        loss_scaler: a `torch.amp.GradScaler`, or None. A disabled one is ignored.
        skip_nonfinite: skip updates without a loss scaler too.
    """

    def __init__(self, max_grad_norm: float | None, loss_scaler: Any | None, skip_nonfinite: bool) -> None:
        self._max_grad_norm = max_grad_norm
        self.loss_scaler = loss_scaler if loss_scaler is not None and loss_scaler.is_enabled() else None
        self.clips = max_grad_norm is not None
        self.probes = self.loss_scaler is not None or skip_nonfinite
        self.needs_norm = self.clips or self.loss_scaler is not None
        self.needs_sum = skip_nonfinite and not self.needs_norm
        self._scale: Tensor | float | None = None  # the loss scale of the gradients
        if self.loss_scaler is not None:
            _sharing.setdefault(self.loss_scaler, weakref.WeakSet()).add(self)

    def remember_scale(self) -> None:
        """Called at the end of a backward pass: its gradients have the loss scale of now."""
        if self.loss_scaler is not None:
            self._scale = self._current_scale(self.loss_scaler)

    def unscale_factor(self, optimizer: torch.optim.Optimizer) -> float | Tensor:
        """Returns the inverse of the gradients' loss scale, 1 after `unscale_`. Does not wait for the device."""
        if self.loss_scaler is None or self._is_unscaled(optimizer):
            return 1.0
        return 1 / (self._current_scale(self.loss_scaler) if self._scale is None else self._scale)

    def _is_unscaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Returns whether the loop has called `unscale_` of the loss scaler."""
        states = {} if self.loss_scaler is None else self.loss_scaler._per_optimizer_states
        return id(optimizer) in states and states[id(optimizer)]["stage"].name == "UNSCALED"

    @staticmethod
    def _current_scale(loss_scaler: Any) -> float | Tensor:
        scale: Tensor | None = loss_scaler._get_scale_async()  # get_scale() would wait for the device
        return float(loss_scaler.get_scale()) if scale is None else scale.double()  # a copy

    def current_scale(self) -> float:
        """Returns the scale of the losses of now, 1 without a loss scaler. Waits for the device."""
        return 1.0 if self.loss_scaler is None else float(self.loss_scaler.get_scale())

    def close(self) -> None:
        """Called when another optimizer takes over: the loss scaler no longer waits for this one."""
        if self.loss_scaler is not None:
            _sharing[self.loss_scaler].discard(self)

    def found_inf(self, finite_probe: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """Returns whether to skip the update, and updates the loss scale accordingly; there is a loss scaler.

        Where optimizers share a loss scaler, the scale is updated once all of them have stepped, as by
        `scaler.step(a); scaler.step(b); scaler.update()`, or before one steps again.

        Args:
            finite_probe: 0-dimensional.
            optimizer: the optimizer that the loss scaler keeps the result for.

        Returns:
            0-dimensional, bool, on the device of `finite_probe`.
        """
        assert self.loss_scaler is not None
        skip = is_nonfinite(finite_probe)
        if self.loss_scaler._scale is None:  # a rank that has had no batch yet
            self.loss_scaler._lazy_init_scale_growth_tracker(skip.device)
        states = self.loss_scaler._per_optimizer_states
        if states[id(optimizer)]["found_inf_per_device"] and not self._is_unscaled(optimizer):
            self.loss_scaler.update()  # which clears the results of all optimizers
            states = self.loss_scaler._per_optimizer_states
        # What GradScaler.unscale_ records after a pass over all gradients, which the norm has made already.
        states[id(optimizer)]["found_inf_per_device"] = {skip.device: skip.float()}
        self._scale = None
        results = [state for state in states.values() if state["found_inf_per_device"]]
        if len(results) >= len(_sharing[self.loss_scaler]):
            self.loss_scaler.update()
        return skip

    def combined(
        self, grad_scale: float | Tensor, finite_probe: Tensor | None, *, carries_found_inf: bool
    ) -> Tensor | None:
        """Returns the factor for the update kernel, 0-dimensional, or None for 1.

        Args:
            grad_scale: the factor that makes the reduced gradients the unscaled mean.
            finite_probe: the norm of that mean where `needs_norm`.
            carries_found_inf: make the factor NaN if `finite_probe` is not finite. The kernel on the device then
                changes no tensor, and the host need not wait for the decision. This is what PyTorch's fused
                optimizers get as a second argument, `found_inf`; `ProbeOnHost` brings it to the host later.
        """
        if finite_probe is not None:
            if self._max_grad_norm is not None:
                # As torch.nn.utils.clip_grad_norm_, including the 1e-6.
                grad_scale = grad_scale * (self._max_grad_norm / (finite_probe + 1e-6)).clamp(max=1.0)
            if carries_found_inf:
                grad_scale = grad_scale + finite_probe * 0  # 0 if finite, else NaN
        if isinstance(grad_scale, float):
            return None if grad_scale == 1 else torch.tensor(grad_scale, dtype=torch.float64, device="cpu")
        return grad_scale


def is_nonfinite(number: Tensor) -> Tensor:
    """Returns whether a number is infinite or NaN, 0-dimensional, bool, on its device."""
    return number.mul(0).ne(0)  # two launches; isfinite() takes four


class ProbeOnHost:
    """Brings the `finite_probe` of an update to the host in the background; one at a time.

    Memory and event are made once, because both cost the host more than the copy.
    """

    def __init__(self) -> None:
        self._number: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._sent_from: tuple[torch.device, torch.dtype] | None = None

    def send(self, probe: Tensor) -> None:
        """Starts to copy a probe, 0-dimensional, on any device."""
        if not probe.is_cuda:
            self._number, self._arrived, self._sent_from = probe, None, None
            return
        if self._sent_from != (probe.device, probe.dtype):
            self._sent_from = probe.device, probe.dtype
            self._number = torch.empty((), dtype=probe.dtype, device="cpu", pin_memory=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        assert self._number is not None and self._arrived is not None
        self._number.copy_(probe, non_blocking=True)
        self._arrived.record(torch.cuda.current_stream(probe.device))

    def is_finite(self) -> bool:
        """Returns whether it is finite. Waits for the work that the device had queued before it was sent."""
        assert self._number is not None
        if self._arrived is not None:
            self._arrived.synchronize()
        return math.isfinite(self._number.item())


class SkipCounter:
    """The number of skipped updates.

    The last update may have been skipped by its kernel on a GPU: the host reads that with the next one, and then
    takes back the step counts.
    """

    def __init__(self) -> None:
        self._count = 0
        self._probe = ProbeOnHost()
        self._undo: Callable[[], None] | None = None  # until it is known whether the last update was skipped

    @property
    def count(self) -> int:
        """The number of skipped updates; waits for an update that is still running on a GPU. May be set."""
        self.record()
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        self.record()
        self._count = count

    def add(self) -> None:
        """Counts an update that the host has skipped."""
        self._count += 1

    def defer(self, finite_probe: Tensor, undo: Callable[[], None]) -> None:
        """Remembers an update that the device skips if a number is not finite.

        Args:
            finite_probe: the number; 0-dimensional.
            undo: takes the step counts of a skipped update back.
        """
        self._probe.send(finite_probe)
        self._undo = undo

    def record(self) -> None:
        """Counts the last update if the device has skipped it; call it before state or layout change."""
        undo, self._undo = self._undo, None
        if undo is not None and not self._probe.is_finite():
            self._count += 1
            undo()


def multiply_gradients(parameters: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiplies all gradients in place; a number 1 costs nothing."""
    if not isinstance(factor, Tensor) and factor == 1.0:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def element_sum(gradients: Tensor) -> Tensor:
    """Returns a number, 0-dim float64, that is finite if and only if all elements are.

    On a CPU it is the sum, added in float32 or wider: the fastest pass over memory. Where that is infinite, which
    large elements may cause, smallest and largest element decide. A GPU adds in float64, without another pass.
    """
    if not gradients.is_cpu:
        return gradients.sum(dtype=torch.float64)
    total = gradients.sum(dtype=torch.promote_types(gradients.dtype, torch.float32)).double()
    return total if total.isfinite() else torch.stack(torch.aminmax(gradients)).double().mul(0).sum()


def probe_of(gradients: list[Tensor]) -> Tensor:
    """Returns a number, 0-dim float64, that is finite if and only if all elements of some tensors are.

    On a GPU the largest element of each, for which PyTorch needs a few launches for all together. On a CPU the
    sums, which take a tenth of the time.

    Args:
        gradients: at least one tensor, and none without elements.
    """
    if all(g.is_cuda for g in gradients):
        values: Sequence[Tensor] = torch._foreach_norm(gradients, math.inf)
    else:
        values = [element_sum(g) for g in gradients]
    if len({(value.dtype, value.device) for value in values}) > 1:
        values = [value.to(values[0].device, torch.float64) for value in values]
    return torch.stack(tuple(values)).double().mul(0).sum()  # finite numbers must not add up to infinity


def norms_of_pieces(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the 2-norms of pieces of the tensors that are small enough not to lose precision.

    Half-precision tensors are converted first: in float16 a norm above 65504 is infinite.

    Returns:
        0-dimensional tensors, float32 or wider.
    """
    pieces = [piece for g in gradients for piece in torch.split(g.reshape(-1), _NORM_ELEMENTS)]
    pieces = [piece.float() if piece.dtype in (torch.float16, torch.bfloat16) else piece for piece in pieces]
    return torch._foreach_norm(pieces) if pieces else ()


def square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the squared 2-norm of all elements of some tensors, 0-dim float64; does not wait for the device.

    Args:
        gradients: all on one device.
    """
    norms = norms_of_pieces(gradients) or [torch.zeros((), device="cpu")]
    return torch.stack(list(norms)).double().square().sum()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all elements of some tensors, 0-dimensional; zero without any."""
    norms = norms_of_pieces(gradients) or [torch.zeros((), device="cpu")]
    widest = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, widest) for norm in norms]))
    return total
