"""`ParameterStore`: where the parameters of an optimizer lie, which kernels update them, and the update."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from hvd_adam.optim import expression, fused, validation
from hvd_adam.optim.flat_layout import Layout, flattenable
from hvd_adam.optim.flat_storage import FlatStorage
from hvd_adam.optim.functional import UPDATES, rounding_seed, signed_scale, update_pieces
from hvd_adam.optim.implementation import (
    first_compile_error,
    kernel_spec,
    layout_signature,
    resolve_auto,
    without_fused,
)
from hvd_adam.optim.optimizer_state import Group, ensure_state, moment_dtype, state_dtypes
from hvd_adam.optim.tensor_lists import group_tensors

States = dict[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class StorePolicy:
    """What several ranks need of a store; the defaults are for one process.

    Attributes:
        always_flat: move parameters into flat buffers for implementations other than "fused", too.
        foreach_only: update with "foreach", whatever the groups ask for.
        bucket_bytes: limit of a bucket's gradients; None for one bucket.
        shard: (rank, ranks): keep the state of this rank's shard of each bucket only. (0, 1) keeps all.
        control: elements of padding to reserve in the first bucket of a buffer, for messages between ranks.
        agree: turns this process's compile error, or None, into the one that all ranks go by.
        warns: warn where there is no fused update.
    """

    always_flat: bool = False
    foreach_only: bool = False
    bucket_bytes: int | None = None
    shard: tuple[int, int] = (0, 1)
    control: int = 0
    agree: Callable[[str | None], str | None] = lambda error: error
    warns: bool = True


class ParameterStore:
    """The layout of an optimizer's parameters, gradients and state in memory, and their update.

    Parameters with the implementation "fused" lie in flat buffers (`storages`); the others stay where they are
    (`unflattened`). Groups and state are arguments of the methods, since `load_state_dict` replaces them.

    Args:
        policy: what differs between one process and several ranks.

    Attributes:
        storages: one for each device, dtype and dtype of moments.
        unflattened: the parameters that are in no storage.
        implementations: for each group "reference", "foreach" or "fused".
    """

    def __init__(self, policy: StorePolicy | None = None) -> None:
        self._policy = policy or StorePolicy()
        self.storages: Sequence[FlatStorage] = ()
        self.unflattened: Set[Tensor] = frozenset()
        self.implementations: Sequence[str] = ()
        self._unflattened_implementations: Sequence[str] = ()  # what cannot be flat has no fused form
        self._signature: object = None  # what the layout was built for
        self._state_ids: Sequence[int] = ()
        self._specs: Mapping[tuple[int, torch.device, torch.dtype], expression.KernelSpec] = {}
        self._frozen: Sequence[Tensor] = ()  # would be flat if they were trained

    @property
    def all_fused(self) -> bool:
        """Whether the fused kernels update every parameter."""
        return not self.unflattened and all(name == "fused" for name in self.implementations)

    # Layout.

    def ensure_layout(self, groups: Sequence[Group], state: States) -> None:
        """Builds the layout unless it fits; see `fits`."""
        if not self.fits(groups, state):
            self.build_layout(groups, state)

    def fits(self, groups: Sequence[Group], state: States) -> bool:
        """Returns whether the layout fits parameters, state and options; copies replaced tensors into it."""
        signature = layout_signature(groups)
        thawed = any(p.requires_grad or p.grad is not None for p in self._frozen)
        kept = self._state_ids == _ids_of(state)
        fit = all((kept and flat.holds_params()) or flat.fits(state) for flat in self.storages)
        if thawed or signature != self._signature or not fit:
            return False
        if not kept:
            self._state_ids = _ids_of(state)
        return True

    def build_layout(self, groups: Sequence[Group], state: States) -> None:
        """Decides what is fused, and moves that into flat buffers."""
        for group in groups:
            for p in group["params"]:
                if p.requires_grad or p.grad is not None:
                    ensure_state(state, p, group)
        self.implementations = self._resolve_implementations(groups)
        self._unflattened_implementations = without_fused(self.implementations)
        params = {p: i for i, group in enumerate(groups) for p in group["params"]}
        always_flat = self._policy.always_flat
        wanted = [p for p, i in params.items() if always_flat or self.implementations[i] == "fused"]
        candidates = flattenable(wanted, among=list(params))
        flat = {p: params[p] for p in candidates if state.get(p)}
        self._frozen = [p for p in candidates if p not in flat]
        kinds: dict[tuple[object, ...], list[Tensor]] = defaultdict(list)
        for p, i in flat.items():
            kinds[p.device, p.dtype, moment_dtype(groups[i], p.dtype)].append(p)
        self.storages = [self._make_storage(kind, [flat[p] for p in kind], state) for kind in kinds.values()]
        self._specs = {
            (i, flat.device, flat.dtype): kernel_spec(groups[i], flat.device, flat.dtype)
            for flat in self.storages
            for i in set(flat.groups)
        }
        self.unflattened = params.keys() - flat.keys()
        self._signature, self._state_ids = layout_signature(groups), _ids_of(state)

    def _make_storage(self, params: list[Tensor], groups: list[int], state: States) -> FlatStorage:
        policy = self._policy
        layout = Layout.of(params, policy.bucket_bytes, policy.shard[1], policy.control)
        return FlatStorage(params, groups, state, layout, policy.shard)

    def _resolve_implementations(self, groups: Sequence[Group]) -> list[str]:
        """Returns each group's implementation; "fused" only where its kernels compile, otherwise "foreach"."""
        if self._policy.foreach_only:
            return ["foreach"] * len(groups)
        resolved = resolve_auto(groups)
        if "fused" not in resolved:
            return resolved
        error = self._policy.agree(first_compile_error(groups, resolved))
        if error is None:
            return resolved
        if self._policy.warns:
            message = f"hvd_adam: no fused update here, using foreach ({error})"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return without_fused(resolved)

    # Update.

    def update(self, groups: Sequence[Group], state: States, grad_scale: Tensor | None = None) -> None:
        """Takes one step; the layout must fit.

        Where everything is fused on a GPU, a NaN `grad_scale` on that device makes a step that changes nothing but
        the step counts, which `FlatStorage.undo_step_counts` restores.

        Args:
            groups: the parameter groups.
            state: the state of every parameter.
            grad_scale: multiplies the gradients; 0-dimensional, on their device or the CPU; None for 1.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype, or the step would be captured in
                a CUDA graph; nothing has been changed.
        """
        if any(flat.device.type == "cuda" for flat in self.storages):
            validation.refuse_graph_capture()
        present = [flat.collect() for flat in self.storages]
        # Before anything changes: both check gradients.
        unflattened = [
            (lists, i)
            for i in (range(len(groups)) if self.unflattened else ())
            for lists in group_tensors(groups[i], self.unflattened, state)
        ]
        for flat, has_grad in zip(self.storages, present, strict=True):
            self._update_flat(flat, has_grad, groups, grad_scale)
        for lists, i in unflattened:
            torch._foreach_add_(lists.counts, 1)
            UPDATES[self._unflattened_implementations[i]](lists, groups[i], grad_scale)

    def _update_flat(
        self, flat: FlatStorage, present: list[bool], groups: Sequence[Group], grad_scale: Tensor | None
    ) -> None:
        for segment in flat.segments(present):
            group, name = groups[segment.group], self.implementations[segment.group]
            for position, buffers in flat.buffers(segment, state_dtypes(group, flat.dtype)):
                if name != "fused":
                    update_pieces(name, buffers, segment.step, position, group, grad_scale)
                    continue
                spec = self._specs[segment.group, flat.device, flat.dtype]
                scalars, seed = expression.scalars(group, segment.step), rounding_seed(segment.step, position)
                fused.update(spec, buffers, signed_scale(group, grad_scale), scalars, seed)


def _ids_of(state: States) -> list[int]:
    """Returns the ids of all state tensors; flat storage keeps its views alive, so no id is reused."""
    return list(map(id, chain.from_iterable(map(dict.values, state.values()))))
