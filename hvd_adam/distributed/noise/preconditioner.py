"""`Preconditioner`: squared norms of gradients that are divided by Adam's √v̂ + ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.optim.formats.eight_bit import decode_exp_avg_sq, scales_of
from hvd_adam.optim.formats.held import ELEMENTS_PER_SCALE, SECOND_CODES
from hvd_adam.optim.formats.random_bits import BLOCK
from hvd_adam.optim.memory import memory_order
from hvd_adam.optim.optimizer_state import State

# Updates of a parameter before its gradients count. v̂ of t updates is a mean of t squares: of noise alone it is
# distributed as χ²/t with t degrees of freedom, and the variance of 1/v̂ is finite from t = 5 on. AdaptDL begins
# there, too.
LEAST_UPDATES = 5

# A second moment below the smallest normal float32 becomes one that divides the gradient to almost nothing. Not
# infinity: the root of 0, of infinity and of denormal numbers takes 20 to 40 times as long as others on x86.
_SMALLEST, _UNKNOWN = 2.0**-126, 2.0**120

# Elements of the temporary. On a CPU it stays in cache; on a GPU it is as large as a bucket, for few launches.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 21


class Gradient(NamedTuple):
    """Elements of the gradient of a parameter: those that its state on this rank belongs to.

    Attributes:
        param: the parameter.
        elements: 1-dimensional, in the order of the parameter's memory.
    """

    param: Tensor
    elements: Tensor


class _Denominator(NamedTuple):
    """√v̂ + ε of a parameter is (√v + ε·root) / root, with root = √(1 − β₂ᵗ) after t updates."""

    second_moment: Callable[[int, int], Tensor]  # v of elements [start, end)
    root: float
    eps: float


class Preconditioner:
    """Adam's denominators before an update, which are identical on all ranks.

    v̂ is "exp_avg_sq" (with AMSGrad "max_exp_avg_sq") divided by 1 − β₂ᵗ after t updates. Elements whose v
    is 0, or below 2⁻¹²⁶, do not count (they have a weight of 2⁻¹²⁰): Adam has seen no gradient of them, and 1/ε²
    would outweigh all others. Nor do parameters with fewer than `LEAST_UPDATES` updates.

    Args:
        optimizer: the optimizer, an Adam.
        shard: (rank, ranks): the state is that of the rank-th part of each bucket. (0, 1): it is whole.

    Attributes:
        shard: as the argument.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shard: tuple[int, int]) -> None:
        self._optimizer, self.shard = optimizer, shard
        self._denominators: dict[Tensor, _Denominator] = {}
        self._scratch = torch.empty(0)  # kept, since pages of new memory take longer than the arithmetic

    def begin(self) -> None:
        """Reads step counts and hyper-parameters, and where the state is, for the calls until the next update."""
        self._denominators = {}
        for group in self._optimizer.param_groups:
            beta2, eps = float(group["betas"][1]), float(group["eps"])
            for p in group["params"]:
                state = self._optimizer.state.get(p, {})  # indexing would add one
                updates = float(state.get("step", 0.0))
                if updates >= LEAST_UPDATES:
                    second_moment = _reader(state, amsgrad=group["amsgrad"])
                    self._denominators[p] = _Denominator(second_moment, math.sqrt(1 - beta2**updates), eps)

    def square_norm(self, gradients: Iterable[Gradient], device: torch.device) -> Tensor:
        """Returns Σ (g / (√v̂ + ε))², 0-dim float64; does not wait for the device.

        Its temporaries have at most 2¹⁸ elements on a CPU, and 2²¹ on a GPU.

        Args:
            gradients: the elements.
            device: theirs.
        """
        limit = _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS
        known = (gradient for gradient in gradients if gradient.param in self._denominators)
        squares = [self._square_norm(chunk) for chunk in _chunks(known, limit)]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)

    def _square_norm(self, chunk: Sequence[_Piece]) -> Tensor:
        found = [self._denominators[piece.param] for piece in chunk]
        gradients = [piece.gradient for piece in chunk]
        dtype = torch.promote_types(gradients[0].dtype, torch.float32)
        flat = self._memory(sum(map(len, gradients)), dtype, gradients[0].device)
        quotients = list(torch.split(flat, list(map(len, gradients))))
        moments = [
            each.second_moment(piece.first, piece.first + len(piece.gradient))
            for each, piece in zip(found, chunk, strict=True)
        ]
        torch._foreach_copy_(quotients, moments)
        torch.threshold_(flat, _SMALLEST, _UNKNOWN).sqrt_()
        torch._foreach_add_(quotients, [each.eps * each.root for each in found])
        flat.reciprocal_()
        torch._foreach_mul_(quotients, gradients)
        norms = torch.stack(list(torch._foreach_norm(quotients))).double()
        roots = torch.tensor([each.root for each in found], dtype=torch.float64, device="cpu")
        return norms.mul(roots.to(flat.device)).square().sum()

    def _memory(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        scratch = self._scratch
        if (scratch.dtype, scratch.device) != (dtype, device) or len(scratch) < elements:
            self._scratch = torch.empty(elements, dtype=dtype, device=device)
        return self._scratch[:elements]


class _Piece(NamedTuple):
    param: Tensor
    first: int  # index of the first element among those of the state
    gradient: Tensor


def _chunks(gradients: Iterable[Gradient], limit: int) -> Iterator[list[_Piece]]:
    """Returns pieces of gradients in lists of at most `limit` elements; all of one dtype in a list."""
    chunk: list[_Piece] = []
    room = limit
    for p, elements in gradients:
        if chunk and chunk[0].gradient.dtype != elements.dtype:
            yield chunk
            chunk, room = [], limit
        first = 0
        while first < len(elements):
            piece = _Piece(p, first, elements[first : first + room])
            chunk.append(piece)
            first, room = first + len(piece.gradient), room - len(piece.gradient)
            if not room:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _reader(state: State, *, amsgrad: bool) -> Callable[[int, int], Tensor]:
    """Returns a function of (start, end) that returns these elements of a second moment, 1-dimensional."""
    if SECOND_CODES[0] not in state:
        moment = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        return lambda start, end: memory_order(moment, start, end - start)
    codes, scales = (state[name] for name in SECOND_CODES)

    def decode(start: int, end: int) -> Tensor:
        block = start // BLOCK * BLOCK
        first = block // ELEMENTS_PER_SCALE
        own = scales[first : first + scales_of(end - block)]
        return decode_exp_avg_sq(memory_order(codes, block, end - block), own)[start - block :]

    return decode
