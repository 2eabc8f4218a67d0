"""`ParameterStore`: which implementation updates each parameter of an optimizer, and the update."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_adam.optim import fused, validation
from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.functional import update_lists
from hvd_adam.optim.implementation import (
    can_be_fused,
    first_compile_error,
    kernel_spec,
    layout_options,
    resolve_auto,
    without_fused,
)
from hvd_adam.optim.lost_updates import LostUpdates
from hvd_adam.optim.memory import increment_versions, is_trained, overlapping, same_objects
from hvd_adam.optim.optimizer_state import Group, Member, Part, StateReader, States
from hvd_adam.optim.tensor_lists import Chunks, chunks
from hvd_adam.optim.update_rows import (
    Arrival,
    Batch,
    Elements,
    HyperParameters,
    Probed,
    UpdateRows,
    hyper_parameters,
)


@dataclass(frozen=True)
class StorePolicy:
    """What several ranks need of a store; the defaults are for one process.

    Attributes:
        foreach_only: update with "foreach", whatever the groups ask for.
        agree: turns this process's compile error, or None, into the one that all ranks go by.
        warns: warn where there is no fused update.
    """

    foreach_only: bool = False
    agree: Callable[[str | None], str | None] = lambda error: error
    warns: bool = True


class ParameterStore:
    """The tables of an optimizer's parameters, gradients and state, and their update. Moves nothing.

    Groups and state are arguments of the methods, since `load_state_dict` replaces them.

    Args:
        policy: what differs between one process and several ranks.

    Attributes:
        implementations: for each group "reference", "foreach" or "fused".
    """

    def __init__(self, policy: StorePolicy | None = None) -> None:
        self._policy = policy or StorePolicy()
        self.implementations: Sequence[str] = ()
        self._rows: list[UpdateRows] = []
        self._sections: dict[int, list[UpdateRows]] = {}
        self._others: Sequence[Member] = ()  # which the fused kernels do not update
        self._sections_of_others: dict[int, list[int]] = {}  # their indices
        self._others_state = StateReader((), (), {})
        self._others_form: object = []  # dtype, device, shape and negative bit of each
        self._frozen: Sequence[Tensor] = ()
        self._options: object = None  # what the layout was built for, as its parameters
        self._params: Sequence[Tensor] = ()
        self._counted: Sequence[list[Tensor]] = ()  # the step counts of the last update
        self._lost_updates = LostUpdates()

    @property
    def all_fused(self) -> bool:
        """Whether the fused kernels update every parameter."""
        return not self._others

    # Layout.

    def ensure_layout(self, groups: Sequence[Group], state: States) -> None:
        """Builds the layout unless it fits; see `fits`."""
        if not self.fits(groups, state):
            self.build_layout(groups, state)

    def check_options(self, groups: Sequence[Group]) -> bool:
        """Returns whether the options of the groups are those that the layout was built for.

        Raises:
            ValueError: they are not, and one is unknown, or they exclude each other.
        """
        if layout_options(groups) == self._options:
            return True
        for group in groups:
            validation.check_format(group)
            validation.check_implementation(group["implementation"])
        return False

    def fits(self, groups: Sequence[Group], state: States) -> bool:
        """Returns whether the layout fits parameters, state and options, after reading replaced tensors.

        Raises:
            ValueError: as `check_options`.
        """
        same_options = self.check_options(groups)
        thawed = any(map(is_trained, self._frozen))
        params = [p for group in groups for p in group["params"]]
        if thawed or not same_options or not same_objects(self._params, params):
            return False
        if self._others:
            if list(map(_form, self._others)) != self._others_form:
                return False
            self._others_state.refresh(groups, state)
        return all(rows.fits(groups, state) for rows in self._rows)

    def build_layout(
        self,
        groups: Sequence[Group],
        state: States,
        parts: Mapping[Tensor, Part] | None = None,
        sections: Mapping[Tensor, int] | None = None,
    ) -> None:
        """Decides which implementation updates each parameter, and makes the state of all complete.

        Args:
            groups: the parameter groups.
            state: the optimizer's state.
            parts: what this process updates of each parameter; all of those that are missing.
            sections: numbers of parameters that are updated together, for `update_section`; None for one section.

        Raises:
            ValueError: a trained parameter is sparse or complex, or has the negative bit.
        """
        params = {p: i for i, group in enumerate(groups) for p in group["params"]}
        self._frozen = [p for p in params if not is_trained(p)]
        validation.check_parameters(list(params))
        self.implementations = self._resolve_implementations(groups)
        parts, sections = parts or {}, sections or {}
        shared = overlapping(list(params))
        kinds: dict[tuple[int, KernelSpec], list[Member]] = defaultdict(list)
        others, position = [], 0
        for p, i in params.items():
            member = Member(p, i, position, parts.get(p) or Part.of(p))
            position += p.numel()
            if not is_trained(p):
                continue
            if self.implementations[i] == "fused" and can_be_fused(p) and p not in shared:
                kinds[sections.get(p, 0), kernel_spec(groups[i], p)].append(member)
            else:
                others.append(member)
        self._rows, self._sections = [], defaultdict(list)
        for (section, spec), members in kinds.items():
            rows = UpdateRows(spec, members, groups, state)
            self._rows.append(rows)
            self._sections[section].append(rows)
        self._others, self._sections_of_others = others, defaultdict(list)
        for i, member in enumerate(others):
            self._sections_of_others[sections.get(member.param, 0)].append(i)
        self._others_state = StateReader(others, groups, state)
        self._others_form = list(map(_form, others))
        self._options, self._params = layout_options(groups), [*params]

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

    def update(
        self,
        groups: Sequence[Group],
        state: States,
        grad_scale: Tensor | None = None,
        probed: Probed | None = None,
    ) -> None:
        """Takes one step; the layout must fit.

        Where everything is fused on a GPU, a NaN `grad_scale` on that device makes a step that changes nothing but
        the step counts, which `undo_step_counts` restores.

        Args:
            groups: the parameter groups.
            state: the state of every parameter.
            grad_scale: multiplies the gradients; 0-dimensional, on their device or the CPU; None for 1.
            probed: what `probe` has returned, if gradients and groups are as they were then: looking at all of
                them again takes longer than the rest of a step on a GPU.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype, or the step would be captured in
                a CUDA graph; nothing has been changed.
        """
        if any(rows.spec.device == "cuda" for rows in self._rows):
            validation.refuse_graph_capture()
        # Before anything changes: both check gradients.
        batches = self._batches() if probed is None else probed.batches
        rest = chunks(self._others, self._others_state.used, groups) if self._others else Chunks()
        numbers = hyper_parameters(groups) if probed is None else probed.numbers
        for spec, batch in batches:
            increment_versions(batch.params)
            fused.update(spec, batch, numbers, grad_scale)
        self._update_others(rest, groups, grad_scale)
        self._counted = [batch.counts for _, batch in batches]
        if self._policy.warns:
            self._lost_updates.count_update(groups)

    def _update_others(self, rest: Chunks, groups: Sequence[Group], grad_scale: Tensor | None) -> None:
        if rest.counts:
            torch._foreach_add_(rest.counts, 1)
        for lists, i in rest.lists:
            name = self.implementations[i]  # what cannot be fused has the form "foreach"
            update_lists("foreach" if name == "fused" else name, lists, groups[i], grad_scale)

    def _batches(self) -> list[tuple[KernelSpec, Batch]]:
        found = [(rows.spec, rows.batch()) for rows in self._rows]
        return [(spec, batch) for spec, batch in found if batch.params]

    def probe(self, groups: Sequence[Group]) -> Probed | None:
        """Finds out on the device whether all gradients are finite; the layout must fit.

        It takes one launch for each kind of parameters, and is not waited for.

        Args:
            groups: the parameter groups.

        Returns:
            None where no kernel does this: not all is fused, on a CPU, on several devices, or without gradients.

        Raises:
            RuntimeError: as `update`.
        """
        if self._others or not all(fused.backend(rows.spec.device).skips_nan for rows in self._rows):
            return None
        batches = self._batches()
        if len({batch.params[0].device for _, batch in batches}) != 1:
            return None
        numbers, mark = hyper_parameters(groups), None
        for spec, batch in batches:
            mark = fused.find_nonfinite(spec, batch, numbers, mark)
        assert mark is not None
        return Probed(mark, batches, numbers)

    def update_sections(self, groups: Sequence[Group], ready: Iterable[Arrival]) -> None:
        """Takes one step, section by section; the layout must fit, and `all_fused`. Bit for bit as `update`.

        Args:
            groups: the parameter groups.
            ready: yields each section, or each part of it in order, as soon as its gradients are there.

        Raises:
            RuntimeError: a gradient is sparse or not of its parameter's dtype.
        """
        numbers = hyper_parameters(groups)
        for section, within in ready:
            self.update_section(section, groups, numbers, within)
        self.sections_updated(groups)

    def update_section(
        self,
        section: int,
        groups: Sequence[Group],
        numbers: Sequence[HyperParameters],
        within: Elements | None = None,
    ) -> None:
        """Takes one step with one section; the layout must fit. Parameters without a gradient do not change.

        Args:
            section: its number.
            groups: the parameter groups.
            numbers: their hyper-parameters, see `hyper_parameters`, the same for all sections of a step.
            within: the elements to update, as in `UpdateRows.batch_within`, where `all_fused`; None for all.

        Raises:
            RuntimeError: as `update_sections`.
        """
        for rows in self._sections.get(section, ()):
            batch = rows.batch() if within is None else rows.batch_within(within)
            if len(batch.rows):
                increment_versions(batch.params)
                fused.update(rows.spec, batch, numbers, None)
        if others := self._sections_of_others.get(section):
            members, used = [self._others[i] for i in others], [self._others_state.used[i] for i in others]
            self._update_others(chunks(members, used, groups), groups, None)

    def sections_updated(self, groups: Sequence[Group], *, released: bool = False) -> None:
        """Ends a step that was taken section by section, after which gradients may have been released."""
        self._counted = ()
        if self._policy.warns:
            self._lost_updates.count_update(groups, released=released)

    def undo_step_counts(self) -> None:
        """Subtracts the last step from the step counts, after an update that has changed nothing."""
        for counts in self._counted:
            torch._foreach_sub_(counts, 1)
        self._counted = ()


def _form(member: Member) -> tuple[object, ...]:
    p = member.param
    return p.dtype, p.device, p.shape, p.is_neg()
