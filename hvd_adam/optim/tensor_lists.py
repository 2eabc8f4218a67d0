"""Lists of tensors that are updated together: the arguments of the reference and foreach updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_adam.optim.formats import pieces
from hvd_adam.optim.formats.choice import rounding, state_format
from hvd_adam.optim.formats.eight_bit import scales_of
from hvd_adam.optim.formats.held import ELEMENTS_PER_SCALE, SCALES
from hvd_adam.optim.formats.random_bits import rounding_seed
from hvd_adam.optim.memory import is_dense, memory_order, placed_like
from hvd_adam.optim.optimizer_state import Group, Member, Part, State
from hvd_adam.optim.validation import check_gradient

# On a CPU lists that stay in cache make a step of 11 M parameters take 20 ms instead of 42 ms, and no temporary of
# the whole model's size is needed. A GPU wants few launches, so there the lists have no limit.
CPU_CHUNK_ELEMENTS = 1 << 18


@dataclass
class TensorLists:
    """Tensors of one parameter group, device and dtype; entry i of every list belongs to parameter i.

    Attributes:
        params: the parameters, or parts of them.
        grads: their gradients.
        exp_avgs: first moments.
        exp_avg_sqs: second moments.
        max_exp_avg_sqs: largest second moments; empty without AMSGrad.
        masters: float32 copies of half-precision parameters; empty where there are none.
        held: where the state is held in few bits: the state of each parameter, which the lists of moments and
            masters are decoded from; else empty.
        state_format, rounding: as in `KernelSpec`.
        steps: number of the step to take, from 1.
        positions: index of the tensor's first element among all of the optimizer's, for stochastic rounding.
        elements: number of elements.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    held: list[State] = field(default_factory=list)
    state_format: str = "float32"
    rounding: str = "nearest"
    steps: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    elements: int = 0

    def append(self, p: Tensor, grad: Tensor, state: State, step: float, position: int) -> None:
        """Adds a parameter, its gradient and every tensor of `state`."""
        self.params.append(p)
        self.grads.append(grad)
        self.steps.append(step)
        self.positions.append(position)
        self.elements += p.numel()
        if self.in_few_bits:
            self.held.append(state)
            return
        self.exp_avgs.append(state["exp_avg"])
        self.exp_avg_sqs.append(state["exp_avg_sq"])
        if "max_exp_avg_sq" in state:
            self.max_exp_avg_sqs.append(state["max_exp_avg_sq"])
        if "master_param" in state:
            self.masters.append(state["master_param"])

    @property
    def in_few_bits(self) -> bool:
        """Whether the state has to be decoded before the update and encoded after it."""
        return self.state_format != "float32" or self.rounding == "correction"

    def decode(self) -> None:
        """Fills the lists of moments and masters with float32 copies of what is held."""
        if not self.in_few_bits:
            return
        states = [pieces.decode(p, held) for p, held in zip(self.params, self.held, strict=True)]
        self.exp_avgs = [state["exp_avg"] for state in states]
        self.exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        self.masters = [state["master_param"] for state in states if "master_param" in state]

    def encode(self) -> None:
        """Stores the lists of moments and masters in what is held, and forgets them."""
        if not self.in_few_bits:
            return
        for i, (p, held) in enumerate(zip(self.params, self.held, strict=True)):
            updated = {"exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]}
            if self.masters:
                updated["master_param"] = self.masters[i]
            seed = rounding_seed(int(self.steps[i]), self.positions[i])
            pieces.encode(p, held, updated, self.state_format, seed)
        self.exp_avgs, self.exp_avg_sqs, self.masters = [], [], []


@dataclass
class Chunks:
    """What the reference and foreach updates work on.

    Attributes:
        lists: the tensors, with the index of their group.
        counts: the step counts to increment.
    """

    lists: list[tuple[TensorLists, int]] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)


def chunks(members: Sequence[Member], used: Sequence[State], groups: Sequence[Group]) -> Chunks:
    """Groups the parameters that have a gradient by group, device and dtype; on CPUs in chunks that fit the cache.

    Args:
        members: the parameters.
        used: their state.
        groups: all parameter groups.

    Raises:
        RuntimeError: a gradient is sparse or not of its parameter's dtype.
    """
    found = Chunks()
    last: dict[tuple[int, torch.device, torch.dtype, str, str], TensorLists] = {}
    for member, state in zip(members, used, strict=True):
        p = member.param
        grad = p.grad
        if grad is None:
            continue
        if grad.layout != torch.strided or grad.dtype != p.dtype:
            check_gradient(p)
        found.counts.append(state["step"])
        step = state["step"].item() + 1
        group = groups[member.group]
        held = state_format(group, p), rounding(group, p)
        key = member.group, p.device, p.dtype, *held
        in_order = TensorLists(state_format=held[0], rounding=held[1]).in_few_bits
        for piece, piece_grad, piece_state, skip in _pieces(p, grad, state, member.part, in_order):
            lists = last.get(key)
            full = lists is not None and p.is_cpu and lists.elements + piece.numel() > CPU_CHUNK_ELEMENTS
            if lists is None or (full and lists.elements):
                lists = last[key] = TensorLists(state_format=held[0], rounding=held[1])
                found.lists.append((lists, member.group))
            lists.append(piece, piece_grad, piece_state, step, member.position + skip)
    return found


def _pieces(
    p: Tensor, grad: Tensor, state: State, part: Part, in_order: bool
) -> Iterator[tuple[Tensor, Tensor, State, int]]:
    """Returns the tensors of a parameter in pieces, each with the index of its first element.

    Args:
        p: the parameter.
        grad: its gradient.
        state: of the part.
        part: what is updated.
        in_order: return 1-dimensional tensors in the order of memory.
    """
    size = CPU_CHUNK_ELEMENTS if p.is_cpu else max(part.length, 1)
    if part.whole and not in_order and (part.length <= size or not is_dense(p)):
        yield p, grad, state, 0
        return
    moments = {name: t for name, t in state.items() if name != "step" and name not in SCALES}
    tensors = {"param": p.detach(), "grad": placed_like(p, grad), **moments}
    in_memory = {
        name: t if t.dim() == 1 and t.numel() == part.length else memory_order(t, part.skip, part.length)
        for name, t in tensors.items()
    }
    for start in range(0, part.length, size):
        piece = {name: t[start : start + size] for name, t in in_memory.items()}
        for name in SCALES & state.keys():
            first = start // ELEMENTS_PER_SCALE
            piece[name] = state[name][first : first + scales_of(len(piece["param"]))]
        yield piece.pop("param"), piece.pop("grad"), piece, part.skip + start
