"""Contiguous storage: parameters, gradients and optimizer state of one device and dtype, as views of flat buffers.

What a user's code sees are ordinary tensors; a step sees one buffer of each kind. The views are checked on every
step: what has come between (`p.grad = …`, `load_state_dict`, `p.data = …`) is copied into its place.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_adam.optim.flat_layout import Layout
from hvd_adam.optim.fused import Buffers
from hvd_adam.optim.huge_pages import zeros

_grad = operator.attrgetter("grad")


@dataclass
class Run:
    """Neighbouring parameters with gradients that take the same step with the same options.

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
    """Parameters and everything of theirs, moved into flat buffers.

    Args:
        params: strided, dense, of one device and dtype, with no memory in common.
        groups: index of each one's parameter group.
        state: of the optimizer, whole for these parameters; its tensors become views of the buffers.
        layout: of `params`.
        part: (rank, ranks): keep the state of this rank's part of each bucket only; its views are 1-dimensional
            then, in the order of memory. (0, 1) keeps all.

    Attributes:
        param, grad: the buffers, of layout.total elements.
        state: state buffers by name, of `shard_spans` elements; "step" has one float32 a parameter, on the CPU.
        shard_spans: (start, end, where that begins in the state buffers) of what this rank keeps state for.
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
        self._param_views = [self.view(self.param, i) for i in range(len(params))]
        self._grad_views = [self.view(self.grad, i) for i in range(len(params))]
        self._pointers = [view.data_ptr() for view in self._param_views]
        self._grad_pointers = [view.data_ptr() for view in self._grad_views]
        self.shard_spans = self._own(*shard)
        self._whole = shard[1] == 1
        self._last_key: tuple | None = None
        self.state: dict[str, Tensor] = {}
        self._state_views: list[dict[str, Tensor]] = [{} for _ in params]
        self._state_ids: list[list[int]] = [[] for _ in params]
        self._make_state()
        for i in range(len(params)):
            self._take_param(i)
            self._take_state(i)

    # Keeping the views in place.

    def fits(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether parameters and state can still live here; puts back what was replaced by its like."""
        self._state_of = state
        if not self.holds_params():
            for i, (p, view) in enumerate(zip(self.params, self._param_views, strict=True)):
                if p.data_ptr() != self._pointers[i] or p.stride() != self._strides[i]:
                    if (p.device, p.dtype) != (self.device, self.dtype) or p.shape != view.shape:
                        return False
                    self._take_param(i)
        for i, p in enumerate(self.params):
            if [*map(id, state[p].values())] != self._state_ids[i]:
                if self._state_views[i].keys() != state[p].keys():
                    return False
                self._take_state(i)
        return True

    def holds_params(self) -> bool:
        """Whether every parameter is still where it was put. Asked on each step: no Python for each parameter."""
        return (
            list(map(Tensor.data_ptr, self.params)) == self._pointers
            and list(map(Tensor.stride, self.params)) == self._strides
        )

    def has(self, state: dict[Tensor, dict[str, Tensor]], i: int, name: str) -> bool:
        """Whether in `state` parameter `i` still has the view of the buffer of this name."""
        view = self._state_views[i].get(name)
        return view is not None and state.get(self.params[i], {}).get(name) is view

    def reclaim(self, state: dict[Tensor, dict[str, Tensor]]) -> None:
        """Throws away what has been put in place of the views of the state."""
        for p, views, ids in zip(self.params, self._state_views, self._state_ids, strict=True):
            state[p] = dict(views)
            ids[:] = map(id, views.values())

    def collect(self, first: int = 0, last: int | None = None) -> list[bool]:
        """Moves the gradients of parameters [first, last) into the buffer; says which of them have one.

        What lies in the buffer for the others is whatever was there before.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype than its parameter.
        """
        params, views = self.params[first:last], self._grad_views[first:last]
        grads, places = list(map(_grad, params)), self._grad_pointers[first:last]
        if all(map(operator.is_, grads, views)) and list(map(Tensor.data_ptr, grads)) == places:
            return [True] * len(grads)
        # `p.grad.data = …`, as Module.to does it, leaves the object and changes where it lies.
        replaced = [
            i
            for i, (grad, view, place) in enumerate(zip(grads, views, places, strict=True))
            if grad is not None and (grad is not view or grad.data_ptr() != place)
        ]
        for i in replaced:
            check_gradient(params[i])
        for i in replaced:
            if views[i].data_ptr() != places[i]:
                views[i] = self._grad_views[first + i] = self.view(self.grad, first + i)
        if replaced:
            torch._foreach_copy_([views[i] for i in replaced], [grads[i] for i in replaced])
        for i in replaced:
            params[i].grad = views[i]
        return [grad is not None for grad in grads]

    def clear(self, i: int) -> None:
        """Gives parameter `i` a gradient of zeros."""
        self._grad_views[i] = self.view(self.grad, i)
        self.params[i].grad = self._grad_views[i].zero_()

    def _take_param(self, i: int) -> None:
        self.params[i].data = self._param_views[i].copy_(self.params[i].data)

    def _take_state(self, i: int) -> None:
        state = self._state_of[self.params[i]]
        for name, view in self._state_views[i].items():
            found = state[name]
            if found is view:
                continue
            if found.shape != view.shape and found.shape == self.params[i].shape:
                found = self._shard_of(found, i)
            if found.shape != view.shape:
                raise RuntimeError(
                    f"{name} of parameter {i} has shape {tuple(found.shape)}, but the parameter has shape "
                    f"{tuple(self.params[i].shape)}"
                )
            state[name] = view.copy_(found)
        self._state_ids[i] = [*map(id, state.values())]

    # Where things are.

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """Parameter `i`'s elements of a buffer of the whole length, in its shape and order of memory."""
        return buffer.as_strided(self.params[i].shape, self._strides[i], self.layout.offsets[i])

    def runs(self, present: list[bool]) -> list[Run]:
        """Counts the step of the parameters that have gradients, and joins those that go together.

        Autograd is told that they change: it sees no write to a buffer, and a later backward pass through a graph
        that has kept the old values must fail, as it does after any optimizer's step.
        """
        _mark_changed([*itertools.compress(self.params, present)])
        self._counted = 1 if all(present) else present
        self._steps += self._counted
        counts = self._steps.tolist()
        if all(present) and self._one_group and counts.count(counts[0]) == len(counts):
            end = self.layout.offsets[-1] + self.params[-1].numel()
            return [Run(self.groups[0], counts[0], 0, end)]
        runs: list[Run] = []
        follows = False
        for i, step in enumerate(counts):
            if present[i]:
                end = self.layout.offsets[i] + self.params[i].numel()
                if follows and (runs[-1].group, runs[-1].step) == (self.groups[i], step):
                    runs[-1].end = end
                else:
                    runs.append(Run(self.groups[i], step, self.layout.offsets[i], end))
            follows = present[i]
        return runs

    def undo_step_counts(self) -> None:
        """Counts the last step less: it has changed nothing."""
        self._steps -= self._counted

    def spans(self, present: list[bool]) -> list[tuple[int, int]]:
        """(start, end) of the elements that this rank owns of parameters that are present, neighbours joined."""
        spans: list[tuple[int, int]] = []
        for i, there in enumerate(present):
            if there:
                start, end = self.layout.offsets[i], self.layout.offsets[i] + self.params[i].numel()
                if i and present[i - 1]:
                    start = spans.pop()[0]
                spans.append((start, end))
        cut = [(max(a, start), min(b, end)) for a, b in spans for start, end, _ in self.shard_spans]
        return [(a, b) for a, b in cut if a < b]

    def unshard(self, name: str) -> Tensor:
        """A state buffer at the whole length: what this rank owns in its place, zeros elsewhere."""
        whole = torch.zeros(self.layout.total, dtype=self.state[name].dtype, device=self.device)
        for start, end, place in self.shard_spans:
            whole[start:end] = self.state[name][place : place + end - start]
        return whole

    def buffers(self, run: Run, names: Iterable[str]) -> list[tuple[int, Buffers]]:
        """What of a run this rank updates: where it begins, and its parts of the buffers and of these states."""
        key = (run.start, run.end, *names)
        if key != self._last_key:  # most steps ask for the same as the one before
            self._last_key, self._last_buffers = key, [*self._cut(run, names)]
        return self._last_buffers

    def _cut(self, run: Run, names: Iterable[str]) -> Iterator[tuple[int, Buffers]]:
        for start, end, place in self.shard_spans:
            a, b = max(run.start, start), min(run.end, end)
            if a < b:
                state = {name: self.state[name][a - start + place : b - start + place] for name in names}
                yield a, Buffers(self.param[a:b], self.grad[a:b], **state)

    def _own(self, rank: int, ranks: int) -> list[tuple[int, int, int]]:
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
        self.state["step"] = torch.zeros(len(self.params), dtype=torch.float32)
        self._steps = self.state["step"].numpy()  # the same memory; for so few numbers NumPy is the quicker one
        for i, p in enumerate(self.params):
            for name in self._state_of[p]:
                self._state_views[i][name] = self._state_view(name, i)

    def _state_view(self, name: str, i: int) -> Tensor:
        if name == "step":
            return self.state[name][i]
        if self._whole:
            return self.view(self.state[name], i)
        _, count, place = self._piece(i)
        return self.state[name][place : place + count]

    def _piece(self, i: int) -> tuple[int, int, int]:
        """(skip, count, place): of parameter `i`'s memory, `count` elements from `skip` on are at `place` here."""
        begin, stop = self.layout.offsets[i], self.layout.offsets[i] + self.params[i].numel()
        for start, end, place in self.shard_spans:
            a, b = max(begin, start), min(stop, end)
            if a < b:
                return a - begin, b - a, a - start + place
        return 0, 0, 0

    def _shard_of(self, whole: Tensor, i: int) -> Tensor:
        """This rank's elements of a whole state tensor, in the order of the parameter's memory."""
        skip, count, _ = self._piece(i)
        in_memory = torch.empty_like(self._param_views[i], dtype=whole.dtype).copy_(whole)
        return in_memory.as_strided((in_memory.numel(),), (1,))[skip : skip + count]


def _mark_changed(params: list[Tensor]) -> None:
    if not hasattr(torch.autograd.graph, "increment_version"):
        for p in params:
            p.detach().as_strided((0,), (1,)).zero_()
        return
    try:
        torch.autograd.graph.increment_version(params)
    except TypeError:  # an older PyTorch takes one at a time
        for p in params:
            torch.autograd.graph.increment_version(p)


def check_gradient(p: Tensor) -> None:
    """Refuses gradients that Adam cannot use."""
    if p.grad.layout != torch.strided:
        raise RuntimeError(
            "Adam does not support sparse gradients: use Embedding(…, sparse=False), or torch.optim.SparseAdam"
        )
    if p.grad.dtype != p.dtype:
        raise RuntimeError(f"Adam needs gradients of the parameter's {p.dtype}, but got {p.grad.dtype}")
