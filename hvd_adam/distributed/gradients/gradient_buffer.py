"""`GradientBuffer`: the gradients of one device and dtype as views of a flat buffer, which is reduced in buckets.

User code sees ordinary gradients; Horovod sees one tensor for each bucket. A gradient that has replaced a view
(`zero_grad`, `p.grad = …`) is copied into the buffer. Parameters and state stay where they are. A gradient that
user code has kept from an earlier pass stays what it is: the buffer then gets other memory. A tensor that user
code has assigned, and holds, becomes the gradient again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hvd_adam.distributed.gradients.bucket_layout import Bucket, Layout
from hvd_adam.optim.memory import (
    any_is_held,
    copy_scaled,
    in_place,
    is_ordinary,
    memory_order,
    shape_in_memory,
    zeros,
)
from hvd_adam.optim.optimizer_state import Part
from hvd_adam.optim.validation import check_gradient

Memory = tuple[Tensor, list[Tensor], list[int]]  # a buffer, its views and their addresses

_grad = operator.attrgetter("grad")


class GradientBuffer:
    """The gradients of parameters of one device and dtype.

    Args:
        params: the parameters.
        layout: of `params`.

    Attributes:
        params, layout: as the arguments.
        device, dtype: of the parameters.
        grad: the buffer, `layout.total` elements.
    """

    def __init__(self, params: list[Tensor], layout: Layout) -> None:
        self.params, self.layout = params, layout
        self._index = {p: i for i, p in enumerate(params)}
        self.device, self.dtype = params[0].device, params[0].dtype
        self._shape = shape_in_memory(params)
        self._strides = [torch.empty_like(p, device="meta").stride() for p in params]
        self._allocate()
        self._spare: Memory | None = None
        self._assigned: dict[int, Tensor] = {}
        self.remember_assigned()
        self.collect()
        self.give_back()

    def _allocate(self) -> None:
        self.grad = zeros(self.layout.total, self.dtype, self.device)
        self._views = [in_place(self.view(self.grad, i)) for i in range(len(self.params))]
        self._addresses = [view.data_ptr() for view in self._views]

    def fits(self) -> bool:
        """Returns whether all parameters still have the dtype, device, shape and strides that they had."""
        return shape_in_memory(self.params) == self._shape

    # Gradients.

    def collect(
        self, first: int = 0, last: int | None = None, scale: float = 1.0, *, attach: bool = True
    ) -> list[bool]:
        """Copies the gradients of parameters [first, last) into the buffer, unless they are views of it.

        Args:
            first: index of the first parameter.
            last: index after the last one; None for all.
            scale: multiplies their gradients. A fresh gradient is multiplied while it is copied.
            attach: make the copies the gradients.

        Returns:
            For each of these parameters whether it has a gradient. The buffer's elements of the others keep their
            old values.

        Raises:
            RuntimeError: a gradient is sparse or of another dtype than its parameter.
        """
        params, views = self.params[first:last], self._views[first:last]
        grads, places = list(map(_grad, params)), self._addresses[first:last]
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
        if scale != 1.0:
            fresh = set(replaced)
            if kept := [grad for i, grad in enumerate(grads) if grad is not None and i not in fresh]:
                torch._foreach_mul_(kept, scale)
        for i in replaced if attach else ():
            params[i].grad = views[i]
        return [grad is not None for grad in grads]

    def take_elsewhere(self, params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Makes the views of the buffer the gradients of parameters, but leaves the values where they are.

        Returns:
            1-dimensional gradients that are to be copied into their views, or used in their place. Those with
            another order of dimensions than their view, or another dtype, are not among them, nor views: `collect`
            has to follow.
        """
        left, own = {}, self.grad.untyped_storage().data_ptr()
        for p in params:
            grad, view = p.grad, self.grad_view(self._index[p])
            if grad is None or not is_ordinary(grad) or grad.untyped_storage().data_ptr() == own:
                continue
            if grad.dtype == self.dtype and grad.stride() == view.stride():
                left[p] = memory_order(grad, 0, grad.numel())
                self._views[self._index[p]] = p.grad = view
        return left

    def leave_kept_gradients(self) -> None:
        """Takes other memory if user code holds gradients that are no parameter's any more.

        They would be overwritten. Called before gradients are collected, and while none is in flight. A loop that
        holds the gradients of the last pass only, in a variable, uses two memories in turn.
        """
        old = [view for p, view in zip(self.params, self._views, strict=True) if p.grad is not view]
        if not any_is_held(old):
            self._spare = None
            return
        spare, self._spare = self._spare, (self.grad, self._views, self._addresses)
        if spare is None or any_is_held(list(spare[1])):
            self._allocate()
        else:
            self.grad, self._views, self._addresses = spare

    def remember_assigned(self) -> None:
        """Remembers gradients that user code has assigned and holds, such as parts of a flat buffer of its own.

        Called before backward, which holds gradients itself.
        """
        self._assigned = {}  # which holds them, too
        assigned = {
            i: p.grad
            for i, p in enumerate(self.params)
            if p.grad is not None and p.grad is not self._views[i]  # no variable, which would hold one
        }
        if assigned and any_is_held(list(assigned.values()), are_gradients=True):
            self._assigned = assigned

    def give_back(self) -> None:
        """Makes remembered tensors the gradients again, with the values of now."""
        for i, grad in self._assigned.items():
            p = self.params[i]
            if p.grad is self._views[i]:
                p.grad = grad.copy_(p.grad)
        self._assigned = {}

    def clear(self, i: int) -> None:
        """Sets the gradient of parameter `i` to zeros, as a view of the buffer."""
        self._views[i] = self.params[i].grad = in_place(self.view(self.grad, i)).zero_()

    def grad_view(self, i: int) -> Tensor:
        """Returns the view of the buffer that `collect` makes the gradient of parameter `i`."""
        if self._views[i].data_ptr() != self._addresses[i]:  # moved by `p.grad.data = …`
            self._views[i] = in_place(self.view(self.grad, i))
        return self._views[i]

    # Positions in the buffer, and in others of the same layout.

    def view(self, buffer: Tensor, i: int) -> Tensor:
        """Returns parameter `i`'s elements of a buffer of `layout.total` elements, with its shape and strides."""
        return buffer.as_strided(self.params[i].shape, self._strides[i], self.layout.offsets[i])

    def spans(self, present: list[bool], shard: tuple[int, int] = (0, 1)) -> list[tuple[int, int]]:
        """Returns (start, end) of the elements of the present parameters, with neighbours joined.

        Args:
            present: for each parameter whether it has a gradient.
            shard: (rank, ranks): only those in this rank's shard of each bucket.
        """
        spans: list[tuple[int, int]] = []
        for i, is_present in enumerate(present):
            if is_present:
                start, end = self.layout.offsets[i], self.layout.offsets[i] + self.params[i].numel()
                if i and present[i - 1]:
                    start = spans.pop()[0]
                spans.append((start, end))
        shards = [bucket.shard(*shard) for bucket in self.layout.buckets]
        cut = [(max(a, start), min(b, end)) for a, b in spans for start, end in shards]
        return [(a, b) for a, b in cut if a < b]

    def parts(self, rank: int, ranks: int) -> list[Part]:
        """Returns each parameter's elements in a rank's shards of the buckets."""
        parts = []
        for bucket in self.layout.buckets:
            start, end = bucket.shard(rank, ranks)
            for i in range(bucket.first, bucket.last):
                offset = self.layout.offsets[i]
                a, b = max(offset, start), min(offset + self.params[i].numel(), end)
                parts.append(Part(a - offset, b - a, whole=False) if a < b else Part(0, 0, whole=False))
        return parts

    def pieces(
        self, bucket: Bucket, start: int, end: int, first: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Returns views of the parameters, not the gradients, whose elements correspond to a part of a bucket.

        Args:
            bucket: of the layout.
            start: first element of the part, as an index into the buffer.
            end: element after its last one.
            first: element to count places from; None for `start`.

        Returns:
            1-dimensional views, each with its place.
        """
        for i in range(bucket.first, bucket.last):
            p, offset = self.params[i], self.layout.offsets[i]
            a, b = max(offset, start), min(offset + p.numel(), end)
            if a < b:
                yield memory_order(p.detach(), a - offset, b - a), a - (start if first is None else first)

    def unshard(
        self, shards: Mapping[int, Tensor], dtype: torch.dtype, rank: int, ranks: int, each: int = 1
    ) -> Tensor:
        """Returns a tensor of `layout.total / each` elements with a rank's shards in place, and zeros elsewhere.

        Args:
            shards: by index of the parameter; 1-dimensional.
            dtype: theirs.
            rank: whose shards they are.
            ranks: number of shards of a bucket.
            each: elements of the parameter to an element of the shards; divides all offsets.
        """
        whole = torch.zeros(self.layout.total // each, dtype=dtype, device=self.device)
        parts = self.parts(rank, ranks)
        for i, shard in shards.items():
            memory_order(whole, (self.layout.offsets[i] + parts[i].skip) // each, len(shard)).copy_(shard)
        return whole
