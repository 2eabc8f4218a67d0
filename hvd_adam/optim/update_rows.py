"""`UpdateRows`: the parameters that one kernel updates, as a table of addresses. Nothing is moved or copied."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.formats.held import elements_each
from hvd_adam.optim.memory import ORDINARY, placed_like, shape_in_memory
from hvd_adam.optim.optimizer_state import Group, Member, StateReader, States
from hvd_adam.optim.validation import check_gradient, check_number

# As `Row` in kernels/rows.h. Of a state with codes, their addresses stand in place of the moments'.
ADDRESSES = (
    *("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"),
    *("exp_avg_scales", "exp_avg_sq_scales", "param_correction", "step"),
)
_CODES = {"exp_avg": "exp_avg_codes", "exp_avg_sq": "exp_avg_sq_codes"}
ROW = np.dtype([(name, np.int64) for name in (*ADDRESSES, "elements", "position", "group")])

Rows = np.ndarray[Any, np.dtype[Any]]

# (first, last) of some elements of each parameter, in the order of its memory. Others have none.
Elements = Mapping[Tensor, tuple[int, int]]
# The number of parameters whose gradients are there, and which of their elements; None for all.
Arrival = tuple[int, Elements | None]

_EXPECTED = {*ORDINARY, type(None)}

_grad = operator.attrgetter("grad")
_layout = operator.attrgetter("layout")


@dataclass
class Batch:
    """What a kernel updates in one step, with the hyper-parameters of that step.

    Attributes:
        rows: of dtype ROW, one for each parameter that has a gradient.
        params: these parameters.
        counts: their step counts: float32, 0-dimensional, on the CPU.
        grads: their gradients, which the rows point to.
        present: the index of each in the table; None if the table has no other parameters.
        plans: where a kernel keeps what it has made of rows of this table; emptied when a parameter or its state
            has a new address.
        plan: what a kernel has made of this batch.
    """

    rows: Rows
    params: list[Tensor]
    counts: list[Tensor]
    grads: list[Tensor]
    present: tuple[int, ...] | None
    plans: dict[object, Any]
    plan: Any = None


class HyperParameters(NamedTuple):
    """Those of a parameter group; `Group` in kernels/rows.h has the same.

    Attributes:
        lr: α.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ.
        decoupled_weight_decay: whether it is applied to the parameter.
        sign: -1 to maximize, else 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    sign: int


FindNonfinite = Callable[[Batch, Sequence[HyperParameters], Tensor | None], Tensor]


class Probed(NamedTuple):
    """Gradients that a device has looked at.

    Attributes:
        one_if_finite: 1 if all elements are finite, else NaN; 0-dimensional, float64, on their device.
        batches: the rows of their parameters, with the spec of the kernel.
        numbers: the hyper-parameters of all groups.
    """

    one_if_finite: Tensor
    batches: list[tuple[KernelSpec, Batch]]
    numbers: list[HyperParameters]


class Kernel(NamedTuple):
    """What is compiled for a spec.

    Attributes:
        update: counts a step of every parameter of a batch and updates it in place. The other arguments are the
            hyper-parameters of all groups, and a factor for the gradients, 0-dimensional or None.
        find_nonfinite: makes a number NaN, float64, 0-dimensional, on the device, if an element of a gradient is
            infinite or NaN, leaves it alone otherwise, and returns it. Without one it makes a 1 of its own. None:
            there is no such kernel.
    """

    update: Callable[[Batch, Sequence[HyperParameters], Tensor | None], None]
    find_nonfinite: FindNonfinite | None = None


def hyper_parameters(groups: Iterable[Group]) -> list[HyperParameters]:
    """Returns the hyper-parameters of all groups, which may have been changed since the groups were added.

    Raises:
        TypeError: one is no number.
        ValueError: a beta is out of range.
    """
    found = []
    for group in groups:
        beta1, beta2 = map(float, group["betas"])
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas is {group['betas']!r}; each must be at least 0 and less than 1")
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name])
        lr, eps, weight_decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        decay = weight_decay, group["decoupled_weight_decay"]
        found.append(HyperParameters(lr, (beta1, beta2), eps, *decay, -1 if group["maximize"] else 1))
    return found


class UpdateRows:
    """The parameters of one kernel, with their state.

    The addresses of parameters and state are read again on every step, since `p.data = …`, `load_state_dict` and
    others replace tensors. No Python code runs for each parameter, unless something was replaced.

    Args:
        spec: of the kernel.
        members: of the spec's device and dtype, at least one.
        groups: all parameter groups.
        states: `Optimizer.state`; made complete for these parameters.

    Attributes:
        spec: as the argument.
        params: the parameters.
    """

    def __init__(
        self, spec: KernelSpec, members: Sequence[Member], groups: Sequence[Group], states: States
    ) -> None:
        self.spec, self._members = spec, members
        self.params = [member.param for member in members]
        self._shape = shape_in_memory(self.params)
        self._rows = np.zeros(len(members), ROW)
        self._rows["elements"] = [member.part.length for member in members]
        self._rows["position"] = [member.position + member.part.skip for member in members]
        self._rows["group"] = [member.group for member in members]
        self._parts = {member.param: (member.part.skip, member.part.length) for member in members}
        self._skipped_bytes = np.array([member.part.skip for member in members]) * spec.dtype.itemsize
        self._addresses: list[int] = []
        self._plans: dict[object, Any] = {}
        self._read_params()
        self._state = StateReader(members, groups, states)
        self._read_state()

    def fits(self, groups: Sequence[Group], states: States) -> bool:
        """Returns whether the table fits the parameters, after reading the addresses of replaced tensors."""
        if shape_in_memory(self.params) != self._shape:
            return False
        self._read_params()
        if self._state.refresh(groups, states):
            self._read_state()
        return True

    def batch(self) -> Batch:
        """Returns the rows of the parameters that have gradients.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype than its parameter.
        """
        grads = list(map(_grad, self.params))
        rows, params, counts, skipped = self._rows, self.params, self._counts, self._skipped_bytes
        shape, present = self._shape, None
        kinds = set(map(type, grads))
        if type(None) in kinds:
            present = tuple(i for i, grad in enumerate(grads) if grad is not None)
            rows, skipped = rows[[*present]], skipped[[*present]]
            params, counts, grads = ([column[i] for i in present] for column in (params, counts, grads))
            shape = shape_in_memory(params)
        if not kinds <= _EXPECTED or not _has_shape(grads, shape):
            for p in params:
                check_gradient(p)
            grads = [placed_like(p, grad) for p, grad in zip(params, grads, strict=True)]
        rows["grad"] = np.array(list(map(Tensor.data_ptr, grads)), np.int64) + skipped
        return Batch(rows, params, counts, grads, present, self._plans)

    def batch_within(self, within: Elements) -> Batch:
        """Returns rows of some elements of each parameter.

        A kernel counts a step of every row. The row of a parameter's first elements counts it, even if this
        process updates none of them; the step of its other rows is taken back here. The rows of a parameter must
        be made and updated in order, each before the next is made.

        Args:
            within: the elements, of which the rows have those that this process updates. The first of a parameter
                is a multiple of `formats.random_bits.BLOCK`.

        Raises:
            RuntimeError: as `batch`.
        """
        batch = self.batch()
        first, last = np.array([within.get(p, (-1, -1)) for p in batch.params], np.int64).reshape(-1, 2).T
        counts_step, continues = first == 0, first > 0
        skip, length = np.array([self._parts[p] for p in batch.params], np.int64).reshape(-1, 2).T
        first, last = (np.clip(place - skip, 0, length) for place in (first, last))
        rows = batch.rows.copy()
        for name, (nbytes, elements) in self._entries.items():
            rows[name] += np.where(rows[name] == 0, 0, first // elements * nbytes)  # 0: there is no such tensor
        rows["elements"] = last - first
        rows["position"] += first
        chosen = np.flatnonzero((last > first) | counts_step).tolist()
        if continued := [batch.counts[i] for i in chosen if continues[i]]:
            torch._foreach_sub_(continued, 1)
        params, counts, grads = (
            [column[i] for i in chosen] for column in (batch.params, batch.counts, batch.grads)
        )
        return Batch(rows[chosen], params, counts, grads, tuple(chosen), plans={})

    def _read_params(self) -> None:
        addresses = list(map(Tensor.data_ptr, self.params))
        if addresses != self._addresses:
            self._addresses = addresses
            self._rows["param"] = np.array(addresses, np.int64) + self._skipped_bytes
            self._plans.clear()

    def _read_state(self) -> None:
        self._counts = [state["step"] for state in self._state.used]
        size = self.spec.dtype.itemsize
        self._entries = {"param": (size, 1), "grad": (size, 1)}  # bytes of an entry, and elements to each
        for name in ADDRESSES[2:]:
            held = name if name in self._state.used[0] else _CODES.get(name, name)
            tensors = [state.get(held) for state in self._state.used]
            self._rows[name] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            some = next((tensor for tensor in tensors if tensor is not None), None)  # as not all use AMSGrad
            if some is not None and name != "step":
                self._entries[name] = some.element_size(), elements_each(held)
        self._plans.clear()


def _has_shape(grads: Sequence[Tensor], shape: object) -> bool:
    """Returns whether all gradients lie in memory as their parameters do, whose `shape_in_memory` is given."""
    return (
        set(map(_layout, grads)) <= {torch.strided}
        and shape_in_memory(grads) == shape
        and not any(map(Tensor.is_neg, grads))
    )
