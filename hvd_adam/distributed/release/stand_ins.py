"""What `p.grad` is between `backward` and `step` where gradients have been released."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

_READ = (
    "p.grad is used between backward() and step(), but release_gradients=True has given gradients back: leave out "
    "what reads, clips, scales or logs them (torch.nn.utils.clip_grad_norm_, GradScaler), or leave the option out"
)


class ReleasedGradient(torch.Tensor):
    """Stands for a gradient; every use of it raises a RuntimeError. It takes the memory of one element.

    None instead would make clipping, scaling and logging do nothing, silently.
    """

    @classmethod
    def __torch_function__(cls, *_: object, **__: object) -> NoReturn:
        """Raises the error."""
        raise RuntimeError(_READ)


class StandIns:
    """Replaces every `p.grad` between `backward` and `step`, also where a bucket waits for `step`."""

    def __init__(self) -> None:
        self._made: dict[Tensor, Tensor] = {}
        self._hidden: dict[Tensor, Tensor | None] = {}  # the gradients that have stand-ins now

    def forget(self) -> None:
        """Called when parameters may have other shapes or dtypes. Nothing may be hidden."""
        self._made.clear()

    @torch.no_grad()
    def hide(self, parameters: Iterable[Tensor], released: Callable[[Tensor], bool]) -> None:
        """Puts stand-ins in place of gradients.

        Args:
            parameters: those that are updated. One without a gradient in this update keeps None.
            released: returns whether the gradient of a parameter has been taken for this update.
        """
        for p in parameters:
            if p.grad is not None or released(p):
                self._hidden[p], p.grad = p.grad, self._stand_in(p)

    def _stand_in(self, p: Tensor) -> Tensor:
        made: Any = self._made.get(p)
        if made is None:
            one = torch.zeros((), dtype=p.dtype, device=p.device)
            made = self._made[p] = one.expand(p.shape).as_subclass(ReleasedGradient)
        return made  # type: ignore[no-any-return]

    def reveal(self, names: Callable[[], Mapping[Tensor, str]]) -> None:
        """Puts the gradients back that wait for `step`.

        Args:
            names: returns a name for every parameter.

        Raises:
            RuntimeError: a stand-in was replaced; nothing has been changed.
        """
        for p in self._hidden:
            if p.grad is not self._made[p]:
                raise RuntimeError(
                    f"the gradient of {names()[p]} was cleared or replaced between backward() and step(), but "
                    "release_gradients=True has used it in backward(): do so before backward() or after step(), "
                    "or leave the option out"
                )
        for p, gradient in self._hidden.items():
            p.grad = gradient
        self._hidden.clear()
