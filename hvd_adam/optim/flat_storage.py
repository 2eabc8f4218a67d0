"""Contiguous storage: parameters, gradients and optimizer state of one device and dtype, as views of flat buffers.

User code sees ordinary tensors; a step sees one buffer of each kind. The views are checked on every step: a tensor
that has replaced one of them (`p.grad = …`, `load_state_dict`, `p.data = …`) is copied into the buffer.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_adam.optim.expression import Buffers
from hvd_adam.optim.flat_layout import Layout
from hvd_adam.optim.flat_memory import copy_scaled, in_place, increment_versions, zeros
from hvd_adam.optim.validation import check_gradient

_grad = operator.attrgetter("grad")


@dataclass
class Segment:
    """Neighbouring parameters that have gradients, belong to one group and take the same step number.

    Attributes:
        group: index of the parameter group.
        step: number of the step to take, from 1.
        start, end: elements [start, end) of the buffers.
    """

    group: int
    step: float
    start: int
    end: int


class FlatStorage:
    """Parameters with their gradients and state, moved into flat buffers.

    Args:
        params: strided, dense, of one device and dtype, without shared memory.
        groups: index of each parameter's group.
        state: `Optimizer.state`, complete for these parameters; its tensors become views of the buffers.
        layout: of `params`.
        shard: (rank, ranks): keep the state of this rank's shard of each bucket only; its views are then
            1-dimensional, in memory order. (0, 1) keeps all.

    Attributes:
        param: the buffer of parameters, `layout.total` elements.
        grad: the buffer of gradients, `layout.total` elements.
        state: state buffers by name, with one element for each of `shard_spans`; "step" has one float32 per
            parameter, on the CPU.
        shard_spans: (start, end, offset in the state buffers) of the elements that this rank keeps state for.
    """

    def __init__(
        self,
        params: list[Tensor],
        groups: list[int],
        state: dict[Tensor, dict[str, Tensor]],
        layout: Layout,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.params, self.groups, self.layout = params, groups, layout
        self._one_group = len(set(groups)) == 1
        self._state_of = state
        self.device, self.dtype = params[0].device, params[0].dtype
        self._strides = [torch.empty_like(p, device="meta").stride() for p in params]
        self.param = zeros(layout.total, self.dtype, self.device)
        self.grad = zeros(layout.total, self.dtype, self.device)
        self._param_views = [in_place(self.view(self.param, i)) for i in range(len(params))]
        self._grad_views = [in_place(self.view(self.grad, i)) for i in range(len(params))]
        self._pointers = [view.data_ptr() for view in self._param_views]
        self._grad_pointers = [view.data_ptr() for view in self._grad_views]
        self.shard_spans = self._spans_of_shard(*shard)
        self._whole = shard[1] == 1
        self._last_key: tuple[object, ...] | None = None
        self.state: dict[str, Tensor] = {}
        self._state_views: list[dict[str, Tensor]] = [{} for _ in params]
        self._state_ids: list[list[int]] = [[] for _ in params]
        self._make_state()
        for i in range(len(params)):
            self._take_param(i)
            self._take_state(i)

    # Checking the views.

    def fits(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Returns whether parameters and state still fit the buffers, after copying replaced ones into them."""
        self._state_of = state
        if not self.holds_params():
            for i, (p, view) in enumerate(zip(self.params, self._param_views, strict=True)):
                if p.data_ptr() != self._pointers[i] or p.stride() != self._strides[i]:
                    moved = view.data_ptr() != self._pointers[i]  # with its parameter, by share_memory()
                    if moved or (p.device, p.dtype) != (self.device, self.dtype) or p.shape != view.shape:
                        return False
                    self._take_param(i)
        for i, p in enumerate(self.params):
            if [*map(id, state[p].values())] != self._state_ids[i]:
                if self._state_views[i].keys() != state[p].keys():
                    return False
                self._take_state(i)
        return True

    def holds_params(self) -> bool:
        """Returns whether every parameter is still a view of the buffer.

        Called on each step, so it runs no Python code per parameter.
        """
        return (
            list(map(Tensor.data_ptr, self.params)) == self._pointers
            and list(map(Tensor.stride, self.params)) == self._strides
        )

    def has(self, state: dict[Tensor, dict[str, Tensor]], i: int, name: str) -> bool:
        """Returns whether `state` of parameter `i` still has the view of the state buffer of this name."""
        view = self._state_views[i].get(name)
        return view is not None and state.get(self.params[i], {}).get(name) is view

    def reclaim(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Makes `state` the views of the buffers again, and drops tensors that have replaced them."""
        for p, views, ids in zip(self.params, self._state_views, self._state_ids, strict=True):
            state[p] = dict(views)
            ids[:] = map(id, views.values())

    def collect(self, first: int = 0, last: int | None = None, scale: float = 1.0) -> list[bool]:
        """Copies the gradients of parameters [first, last) into the buffer, unless they are views of it.

        Args:
            first: index of the first parameter.
            last: index after the last one; None for all.
            scale: multiplies their gradients. A fresh gradient is multiplied while it is copied.

        Returns:
            For each of these parameters whether it has a gradient. The buffer's elements of the others keep their
            old values.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype than its parameter.
        """
        params, views = self.params[first:last], self._grad_views[first:last]
        grads, places = list(map(_grad, params)), self._grad_pointers[first:last]
        if all(map(operator.is_, grads, views)) and list(map(Tensor.data_ptr, grads)) == places:
            if scale != 1.0 and grads:
                end = self.layout.offsets[first + len(grads) - 1] + params[-1].numel()
                self.grad[self.layout.offsets[first] : end].mul_(scale)
            return [True] * len(grads)
        # `p.grad.data = …`, as in Module.to, keeps the object and changes its memory.
        replaced = [
            i
            for i, (grad, view, place) in enumerate(zip(grads, views, places, strict=True))
            if grad is not None and (grad is not view or grad.data_ptr() != place)
        ]
        for i in replaced:
            check_gradient(params[i])
        for i in replaced:
            views[i] = self.grad_view(first + i)
        if replaced:
            copy_scaled([views[i] for i in replaced], [grads[i] for i in replaced], scale)
        if scale != 1.0 and (kept := [g for i, g in enumerate(grads) if g is not None and i not in set(replaced)]):
            torch._foreach_mul_(kept, scale)
        for i in replaced:
            params[i].grad = views[i]
        return [grad is not None for grad in grads]

    def clear(self, i: int) -> None:
        """Sets the gradient of parameter `i` to zeros, as a view of the buffer."""
        self._grad_views[i] = self.params[i].grad = in_place(self.view(self.grad, i)).zero_()

    def grad_view(self, i: int) -> Tensor:
        """Returns the view of the buffer that `collect` makes the gradient of parameter `i`."""
        if self._grad_views[i].data_ptr() != self._grad_pointers[i]:  # moved by `p.grad.data = …`
            self._grad_views[i] = in_place(self.view(self.grad, i))
        return self._grad_views[i]

    def _take_param(self, i: int) -> None:
        self.params[i].data = self._param_views[i].copy_(self.params[i].data)

    def _take_state(self, i: int) -> None:
        state = self._state_of[self.params[i]]
        for name, view in self._state_views[i].items():
            found = state[name]
            if found is view:
                continue
            if found.shape != view.shape and found.shape == self.params[i].shape:
                found = self._shard_of_state(found, i)
            if found.shape != view.shape:
                raise RuntimeError(
                    f"{name} of parameter {i} has shape {tuple(found.shape)}, but the parameter has shape "
                    f"{tuple(self.params[i].shape)}"
                )
            state[name] = view.copy_(found)
        self._state_ids[i] = [*map(id, state.values())]

    # Positions in the buffers.

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """Returns parameter `i`'s elements of a buffer of `layout.total` elements, with its shape and strides."""
        return buffer.as_strided(self.params[i].shape, self._strides[i], self.layout.offsets[i])

    def segments(self, present: list[bool]) -> list[Segment]:
        """Counts the step of the parameters that have gradients, and returns them joined into segments.

        It also increments autograd's version of these parameters: autograd does not see writes to the buffer, and
        a later backward pass through a graph that has saved the old values must fail, as after every optimizer.

        Args:
            present: for each parameter whether it has a gradient.
        """
        increment_versions([*itertools.compress(self.params, present)])
        self._counted = 1 if all(present) else present
        self._steps += self._counted
        counts = self._steps.tolist()
        if all(present) and self._one_group and counts.count(counts[0]) == len(counts):
            end = self.layout.offsets[-1] + self.params[-1].numel()
            return [Segment(self.groups[0], counts[0], 0, end)]
        segments: list[Segment] = []
        follows = False
        for i, step in enumerate(counts):
            if present[i]:
                end = self.layout.offsets[i] + self.params[i].numel()
                if follows and (segments[-1].group, segments[-1].step) == (self.groups[i], step):
                    segments[-1].end = end
                else:
                    segments.append(Segment(self.groups[i], step, self.layout.offsets[i], end))
            follows = present[i]
        return segments

    def undo_step_counts(self) -> None:
        """Subtracts the last step from the step counts, after an update that has changed nothing."""
        self._steps -= self._counted

    def spans(self, present: list[bool]) -> list[tuple[int, int]]:
        """Returns (start, end) of this rank's elements of the present parameters, with neighbours joined."""
        spans: list[tuple[int, int]] = []
        for i, is_present in enumerate(present):
            if is_present:
                start, end = self.layout.offsets[i], self.layout.offsets[i] + self.params[i].numel()
                if i and present[i - 1]:
                    start = spans.pop()[0]
                spans.append((start, end))
        cut = [(max(a, start), min(b, end)) for a, b in spans for start, end, _ in self.shard_spans]
        return [(a, b) for a, b in cut if a < b]

    def unshard(self, name: str) -> Tensor:
        """Returns a state buffer of `layout.total` elements: this rank's shard in place, zeros elsewhere."""
        whole = torch.zeros(self.layout.total, dtype=self.state[name].dtype, device=self.device)
        for start, end, place in self.shard_spans:
            whole[start:end] = self.state[name][place : place + end - start]
        return whole

    def buffers(self, segment: Segment, names: Iterable[str]) -> list[tuple[int, Buffers]]:
        """Returns this rank's part of a segment: slices of the buffers, each with the index of its first element.

        Args:
            segment: of `segments`.
            names: the state buffers to include.
        """
        key = (segment.start, segment.end, *names)
        if key != self._last_key:  # most steps repeat the previous one's key
            self._last_key, self._last_buffers = key, [*self._slices(segment, names)]
        return self._last_buffers

    def _slices(self, segment: Segment, names: Iterable[str]) -> Iterator[tuple[int, Buffers]]:
        for start, end, place in self.shard_spans:
            a, b = max(segment.start, start), min(segment.end, end)
            if a < b:
                state = {name: self.state[name][a - start + place : b - start + place] for name in names}
                yield a, Buffers(self.param[a:b], self.grad[a:b], **state)

    def _spans_of_shard(self, rank: int, ranks: int) -> list[tuple[int, int, int]]:
        if ranks == 1:
            return [(0, self.layout.total, 0)]
        shard_spans, place = [], 0
        for bucket in self.layout.buckets:
            start, end = bucket.shard(rank, ranks)
            shard_spans.append((start, end, place))
            place += end - start
        return shard_spans

    def _make_state(self) -> None:
        length = sum(end - start for start, end, _ in self.shard_spans)
        names = {name: t for p in self.params for name, t in self._state_of[p].items()}
        for name, like in names.items():
            self.state[name] = zeros(length, like.dtype, self.device)
        self.state["step"] = torch.zeros(len(self.params), dtype=torch.float32, device="cpu")
        self._steps = self.state["step"].numpy()  # the same memory; NumPy is faster for so few numbers
        for i, p in enumerate(self.params):
            for name in self._state_of[p]:
                self._state_views[i][name] = self._state_view(name, i)

    def _state_view(self, name: str, i: int) -> Tensor:
        if name == "step":
            return self.state[name][i]
        if self._whole:
            return self.view(self.state[name], i)
        _, count, place = self._shard_of_param(i)
        return self.state[name][place : place + count]

    def _shard_of_param(self, i: int) -> tuple[int, int, int]:
        """Returns (skip, count, place) of this rank's shard of parameter `i`.

        Its `count` elements begin at element `skip` of the parameter's memory and at `place` of the state buffers.
        """
        begin, stop = self.layout.offsets[i], self.layout.offsets[i] + self.params[i].numel()
        for start, end, place in self.shard_spans:
            a, b = max(begin, start), min(stop, end)
            if a < b:
                return a - begin, b - a, a - start + place
        return 0, 0, 0

    def _shard_of_state(self, whole: Tensor, i: int) -> Tensor:
        """Returns this rank's elements of a whole state tensor, in the order of parameter `i`'s memory."""
        skip, count, _ = self._shard_of_param(i)
        in_memory = torch.empty_like(self._param_views[i], dtype=whole.dtype).copy_(whole)
        return in_memory.as_strided((in_memory.numel(),), (1,))[skip : skip + count]
