"""`HorovodAdapter`: the only module that knows private names of `hvd.DistributedOptimizer`.

Horovod's wrapper registers the backward hooks, and tells when the gradients of a bucket are complete. The rest of
what it does is replaced, because the wrapper

- creates the optimizer again and loses its state and step hooks,
- sums over accumulated micro-batches where the mean is wanted,
- averages in `step`, so that clipping and unscaling before it see gradients of one rank,
- updates parameters that have no gradient on any rank,
- calls step hooks twice,
- copies every gradient into and out of a buffer, in an order of additions that depends on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import elastic_disabled

# Private names of Horovod 0.28.1 (horovod/torch/optimizer.py). A test checks that the installed version has them.
WRAPPER_NAMES = (
    "_allreduce_delay",  # by parameter: micro-batches until its gradient is complete
    "_grad_accs",  # keeps the nodes alive that have hooks
    "_handles",  # reductions in flight, by parameter or bucket
    "_make_hook",
    "_parameter_names",
    "_requires_update",  # the parameters that have hooks
)
AVERAGE_NAMES = ("_group_counts", "_grouped_allreduce_grad_async", "_p_to_group")  # "group" is a bucket here
ADASUM_NAMES = ("_allreduce_grad_async", "_starting_models")

Buckets = Sequence[tuple[Tensor, ...]]


class HorovodAdapter:
    """Wraps an optimizer in `hvd.DistributedOptimizer`, and drives the wrapper.

    The wrapper is an object of a subclass of the optimizer's class, so that it runs the `step` of a user's
    subclass. It has the optimizer's parameter groups, but no state until `share` gives it one.

    Args:
        optimizer: the optimizer to wrap.
        names: a name for each parameter, unique, identical on all ranks.
        accumulate: micro-batches per update.
        compression: has the methods of `horovod.torch.Compression`; Horovod uses it for Adasum only.
        adasum: combine updates by Adasum instead of reducing gradients.
        buckets: the parameters of each bucket; None with Adasum and on one rank.
        reduce_bucket: called in backward with the parameters of a bucket once their gradients are complete; starts
            the reduction. Not called with Adasum.
        overrides: methods of the optimizer that the wrapper gets instead of its own, by name.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Mapping[Tensor, str],
        *,
        accumulate: int,
        compression: object,
        adasum: bool,
        buckets: Buckets | None,
        reduce_bucket: Callable[[tuple[Tensor, ...]], None],
        overrides: Mapping[str, Callable[..., Any]],
    ) -> None:
        hvd = horovod()
        self._accumulate, self._adasum = accumulate, adasum
        with elastic_disabled():  # Horovod would register hooks on one rank too
            self._wrapper: Any = hvd.DistributedOptimizer(
                optimizer,
                named_parameters=[(name, p) for p, name in names.items()],
                compression=compression,
                backward_passes_per_step=accumulate,
                op=hvd.Adasum if adasum else hvd.Sum,
                groups=None if buckets is None else [list(bucket) for bucket in buckets],
            )
        for name, method in overrides.items():
            setattr(self._wrapper, name, method)
        if adasum:
            self._average_micro_batches()
        else:

            def start(bucket: tuple[Tensor, ...]) -> tuple[None, None]:
                reduce_bucket(bucket)
                return None, None  # no handle: `Reducer` waits for the reduction

            self._wrapper._grouped_allreduce_grad_async = start

    @property
    def in_flight(self) -> bool:
        """Whether gradients have been computed since the last update or `rearm`."""
        return bool(self._wrapper._handles)

    def first_unhooked(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """Returns the first parameter that has a gradient but no hook, so that backward does not report it.

        Not for one rank, where Horovod registers no hooks.
        """
        hooked = self._wrapper._requires_update
        return next((p for p in parameters if p.grad is not None and p not in hooked), None)

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the wrapper use the parameter groups, state and defaults of an optimizer, instead of copies."""
        self._wrapper.param_groups, self._wrapper.state = optimizer.param_groups, optimizer.state
        self._wrapper.defaults = optimizer.defaults

    def set_buckets(self, buckets: Buckets) -> None:
        """Replaces the buckets; the hooks count the gradients of each from zero."""
        self._wrapper._p_to_group = {p: bucket for bucket in buckets for p in bucket}
        self._wrapper._group_counts = dict.fromkeys(buckets, 0)

    def rearm(self) -> None:
        """Prepares the hooks for the next update; not with Adasum, where `step` does."""
        wrapper = self._wrapper
        wrapper._handles.clear()
        wrapper._group_counts = dict.fromkeys(wrapper._group_counts, 0)
        wrapper._allreduce_delay = dict.fromkeys(wrapper._allreduce_delay, self._accumulate)

    def step(self) -> None:
        """Runs the optimizer's own `step`; with Adasum once per parameter, and combines the ranks' updates."""
        if self._adasum:
            self._wrapper.step()
            return
        with self._wrapper.skip_synchronize():
            self._wrapper.step()

    @torch.enable_grad()
    def add_hooks(self, names: Mapping[Tensor, str]) -> None:
        """Does for added parameters what the wrapper's constructor did for the first ones.

        Args:
            names: as in the constructor.
        """
        wrapper = self._wrapper
        for parameter, name in names.items():
            wrapper._parameter_names[parameter] = name
            wrapper._allreduce_delay[parameter] = self._accumulate
            wrapper._requires_update.add(parameter)
            if self._adasum:
                wrapper._starting_models[parameter] = torch.zeros_like(parameter, requires_grad=False)
            view: Any = parameter.expand_as(parameter)
            accumulator = view.grad_fn.next_functions[0][0]
            accumulator.register_hook(wrapper._make_hook(parameter))
            wrapper._grad_accs.append(accumulator)

    def _average_micro_batches(self) -> None:
        """Divides gradients by the number of micro-batches; Horovod's Adasum steps on their sum."""
        combine = self._wrapper._allreduce_grad_async

        def step_and_combine(parameter: torch.nn.Parameter) -> Any:
            if parameter.grad is not None:
                parameter.grad.div_(self._accumulate)
            return combine(parameter)

        self._wrapper._allreduce_grad_async = step_and_combine


def move_step_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Makes `target` call the hooks that are registered with `source`; their handles still remove them.

    Horovod's wrapper is created from parameter groups only, and so calls none of them. PyTorch has no public
    access to an optimizer's hooks: they are the attributes named `_optimizer_*_hooks`.
    """
    for name, hooks in vars(source).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(target, name, hooks)


def prefixed(prefix: str, names: Mapping[Tensor, str], parameters: Iterable[Tensor]) -> dict[Tensor, str]:
    """Returns the names of some parameters for Horovod, unique among all optimizers through the prefix."""
    return {p: f"{prefix}.{names[p]}" for p in parameters}
