"""A warning where updates are too small to move weights in the format that they are stored in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvd_adam.optim.formats.choice import rounding
from hvd_adam.optim.optimizer_state import Group

# After so many updates, when a warm-up of the learning rate is usually over; each check reads all parameters once.
CHECKS = (100, 1_000, 10_000)


class LostUpdates:
    """Looks at the weights a few times in a training, and warns once.

    An update of Adam moves a weight w by about the learning rate. Rounding to nearest loses it if that is less
    than half a unit in the last place of w, which is at least ε/4 · |w| with the ε of the weight's dtype.
    """

    def __init__(self) -> None:
        self._updates = 0
        self._warned = False

    def count_update(self, groups: Sequence[Group], *, released: bool = False) -> None:
        """Counts an update of parameter groups, and checks after some.

        Args:
            groups: all parameter groups.
            released: gradients are None after the update; what is trained then counts as updated.
        """
        self._updates += 1
        if self._updates not in CHECKS or self._warned:
            return
        lost = list(_lost(groups, released))
        if lost:
            self._warned = True
            p, lr = lost[0]
            warnings.warn(
                f"hvd_adam: with lr={lr:.3g}, updates of {len(lost)} parameters (the first has shape "
                f"{tuple(p.shape)}) are less than half a unit in the last place of their {p.dtype} weights, and "
                "rounding loses them: use master_weights=True or '8bit', or stochastic_rounding=True",
                RuntimeWarning,
                stacklevel=2,
            )


@torch.no_grad()
def _lost(groups: Sequence[Group], released: bool) -> Iterator[tuple[Tensor, float]]:
    """Returns the parameters whose average weight is not moved, with their learning rate."""
    for group in groups:
        lr = float(group["lr"])
        for p in group["params"]:
            updated = p.requires_grad if released else p.grad is not None
            if lr > 0 and updated and p.numel() and rounding(group, p) == "nearest":
                smallest = torch.finfo(p.dtype).eps / 4 * p.detach().abs().mean(dtype=torch.float32)
                if lr < smallest.item():
                    yield p, lr
