"""`HorovodAdapter`: the only module that knows private names of `hvd.DistributedOptimizer`.

Horovod's wrapper registers the backward hooks, and tells when the gradients of a bucket are complete. The rest of
what it does is replaced, because the wrapper

- creates the optimizer again and loses its state and step hooks,
- sums over accumulated micro-batches where the mean is wanted,
- averages in `step`, so that clipping and unscaling before it see gradients of one rank,
- ends a second backward pass before `step` with an `AssertionError` without a message,
- has hooks that cannot be removed, and that outlive it,
- calls step hooks twice, and updates parameters that have no gradient on any rank,
- copies every gradient into and out of a buffer, in an order of additions that depends on timing.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.backward_pass import gradient_node, trained
from hvd_adam.distributed.launch_env import elastic_disabled
from hvd_adam.optim.adam import Adam, PlainOptimizer
from hvd_adam.optim.parameter_store import ParameterStore
from hvd_adam.optim.plain_optimizer import not_compiled

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
        before_accumulation: called in backward before autograd adds to the gradient of a parameter; returns
            whether the gradient is complete then. None if nothing is to be called.
        after_accumulation: called in backward after autograd has added to the gradient of a parameter, even if the
            parameter's dtype has changed since, at which autograd drops other hooks; or None.
        bucket_complete: called in backward with the parameters of a bucket once all of them are complete. Not
            called with Adasum.

    Attributes:
        plain_step: `Adam.steps_plainly` of the optimizer.
    """

    def __init__(
        self,
        optimizer: Adam,
        names: Mapping[Tensor, str],
        *,
        accumulate: int,
        compression: object,
        adasum: bool,
        buckets: Buckets | None,
        before_accumulation: Callable[[Tensor], bool] | None,
        after_accumulation: Callable[[Tensor], None] | None,
        bucket_complete: Callable[[tuple[Tensor, ...]], None],
    ) -> None:
        hvd = horovod()
        self._before_accumulation = before_accumulation
        self._after_accumulation = None
        if after_accumulation is not None:  # the garbage collector does not look into hooks of this kind
            self._after_accumulation = functools.partial(_call_if_alive, weakref.WeakMethod(after_accumulation))
        self._pre_hooks: list[Any] = []  # handles of hooks, and the nodes that keep them alive
        self._post_hooks: dict[Tensor, Any] = {}  # handles of hooks
        self._adapted = optimizer
        self.plain_step = optimizer.steps_plainly
        self._accumulate, self._adasum = accumulate, adasum
        with elastic_disabled():  # Horovod would register hooks on one rank too
            self._wrapper: Any = hvd.DistributedOptimizer(
                _constructible(optimizer),
                named_parameters=[(name, p) for p, name in names.items()],
                compression=compression,
                backward_passes_per_step=accumulate,
                op=hvd.Adasum if adasum else hvd.Sum,
                groups=None if buckets is None else [list(bucket) for bucket in buckets],
            )
        self._nodes = set(self._wrapper._grad_accs)
        if adasum:
            self._average_micro_batches()
        else:
            self.set_buckets(buckets or ())

            def start(bucket: tuple[Tensor, ...]) -> tuple[None, None]:
                bucket_complete(bucket)
                return None, None  # no handle: `Reducer` waits for the reduction

            self._wrapper._grouped_allreduce_grad_async = start
        self.follow(names)

    @property
    def in_flight(self) -> bool:
        """Whether Adasum has gradients or updates in flight."""
        return bool(self._wrapper._handles)

    def has_hook(self, parameter: Tensor) -> bool:
        """Returns whether backward reports the gradient of a parameter that is trained."""
        # For a parameter whose dtype has changed, autograd has made another node.
        return parameter in self._wrapper._requires_update and gradient_node(parameter) in self._nodes

    def first_unhooked(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """Returns the first parameter with a gradient that backward does not report. Not on one rank."""
        hooked = self._wrapper._requires_update
        return next((p for p in parameters if p.grad is not None and p not in hooked), None)

    def share(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes the wrapper use the parameter groups, state and defaults of an optimizer, instead of copies.

        So does the optimizer that was wrapped: a scheduler may have been made for it.
        """
        for other in (self._wrapper, self._adapted):
            other.param_groups, other.state = optimizer.param_groups, optimizer.state
            other.defaults = optimizer.defaults

    def set_buckets(self, buckets: Buckets) -> None:
        """Replaces the buckets; the hooks count the gradients of each from zero."""
        keys = [_Key(bucket) for bucket in buckets]
        self._wrapper._p_to_group = {p: key for key in keys for p in key}
        self._wrapper._group_counts = dict.fromkeys(keys, 0)

    def rearm(self) -> None:
        """Counts complete gradients from zero, for the next round; not with Adasum, where `step` does."""
        self._wrapper._handles.clear()
        self._wrapper._group_counts = dict.fromkeys(self._wrapper._group_counts, 0)

    def step(self, update: Callable[[], None]) -> None:
        """Runs the optimizer's own `step`, which may be that of a user's subclass, with `update` as its update."""
        if self.plain_step:  # which does nothing else
            update()
        else:
            self._wrapper.update_by(update)
            with self._wrapper.skip_synchronize():
                self._wrapper.step()
        self._adapted._opt_called = True  # type: ignore[attr-defined]  # what a scheduler made for it looks for

    def step_adasum(self, store: ParameterStore) -> None:
        """Runs the optimizer's own `step` for each parameter, and combines the ranks' updates.

        Args:
            store: updates the parameters.
        """
        wrapper = self._wrapper

        def update() -> None:  # Horovod leaves one parameter in the groups
            store.ensure_layout(wrapper.param_groups, wrapper.state)
            store.update(wrapper.param_groups, wrapper.state)

        wrapper.update_by(update)
        wrapper.step()
        self._adapted._opt_called = True  # type: ignore[attr-defined]

    def retire(self) -> None:
        """Makes the hooks do nothing, for good. Horovod's cannot be removed while a graph holds them."""
        for handle, _ in self._pre_hooks:
            handle.remove()
        self._pre_hooks.clear()
        for handle in self._post_hooks.values():
            handle.remove()
        self._post_hooks.clear()
        wrapper = self._wrapper
        wrapper._allreduce_delay = defaultdict(lambda: math.inf)  # never reaches zero
        wrapper._handles = _Nothing()
        self._nodes.clear()
        wrapper._grad_accs.clear()  # the nodes, and their hooks, go with the last graph
        wrapper.param_groups, wrapper.state = [], {}

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
            accumulator = gradient_node(parameter)
            accumulator.register_hook(wrapper._make_hook(parameter))
            wrapper._grad_accs.append(accumulator)
            self._nodes.add(accumulator)
        self.follow(names)

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """Adds the hooks that run before Horovod's. Frozen parameters get them too: they may be unfrozen."""
        before = self._refuse_second_pass if self._adasum else self._prepare_hook
        if not self._adasum and self._before_accumulation is None:
            return
        hooked = {accumulator for _, accumulator in self._pre_hooks}
        for parameter in parameters:
            accumulator = gradient_node(parameter)
            if accumulator not in hooked:
                hook = functools.partial(before, parameter)
                self._pre_hooks.append((accumulator.register_prehook(hook), accumulator))
            if self._after_accumulation is not None and parameter not in self._post_hooks:
                with trained(parameter):
                    register: Any = parameter.register_post_accumulate_grad_hook  # PyTorch's is untyped
                    self._post_hooks[parameter] = register(self._after_accumulation)

    @not_compiled
    def _prepare_hook(self, p: Tensor, *_: object) -> None:
        assert self._before_accumulation is not None
        complete = self._before_accumulation(p)
        # The wrapper's hook, which runs next, subtracts one. At zero it counts the gradient as complete.
        self._wrapper._allreduce_delay[p] = 1 if complete else 2

    def _refuse_second_pass(self, p: Tensor, *_: object) -> None:
        if self._wrapper._allreduce_delay.get(p, 1) <= 0:
            raise RuntimeError(
                "op='adasum' takes one backward pass for each step(), whose updates it combines while the pass "
                "is running: add the losses and call backward() once, or use op='average'"
            )

    def _average_micro_batches(self) -> None:
        """Divides gradients by the number of micro-batches; Horovod's Adasum steps on their sum."""
        combine = self._wrapper._allreduce_grad_async

        def step_and_combine(parameter: torch.nn.Parameter) -> Any:
            if parameter.grad is not None:
                parameter.grad.div_(self._accumulate)
            return combine(parameter)

        self._wrapper._allreduce_grad_async = step_and_combine


class _Key(tuple[Tensor, ...]):
    """A bucket that is hashed by identity: Horovod's hooks look it up for each of its parameters."""

    __slots__ = ()
    __hash__ = object.__hash__
    __eq__ = object.__eq__


class _Nothing(dict[Any, Any]):
    """A dictionary that stays empty."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forgets the item."""


@not_compiled
def _call_if_alive(method: weakref.WeakMethod[Callable[[Tensor], None]], parameter: Tensor) -> None:
    callback = method()
    if callback is not None:
        callback(parameter)


def _constructible(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Returns what Horovod may take for an optimizer: it calls the class with parameter groups only.

    The constructor of a user's class may need more, and sets attributes that its `step` reads. Here it takes both
    from the optimizer, and creates no state.
    """

    def construct(self: torch.optim.Optimizer, params: Any) -> None:
        vars(self).update({name: value for name, value in vars(optimizer).items() if not hasattr(Adam, name)})
        vars(self)["_make_hook"] = functools.partial(_tolerant_hook, self)
        PlainOptimizer.__init__(self, params, optimizer.defaults)

    kind = type(optimizer)
    methods = {"__init__": construct, "add_param_group": PlainOptimizer.add_param_group}
    constructible: Any = object.__new__(type(kind.__name__, (kind,), methods))
    constructible.param_groups = optimizer.param_groups
    return constructible  # type: ignore[no-any-return]


def _tolerant_hook(wrapper: Any, parameter: Tensor) -> Callable[..., None]:
    """Returns Horovod's hook, not called where a user has dropped the gradient or the parameter."""
    hook = type(wrapper)._make_hook(wrapper, parameter)

    @not_compiled
    def call_with_gradient(*gradients: object) -> None:
        if parameter.grad is None:
            return
        in_bucket = parameter in getattr(wrapper, "_p_to_group", (parameter,))  # Adasum has no buckets
        if in_bucket or any(p is parameter for group in wrapper.param_groups for p in group["params"]):
            hook(*gradients)

    return call_with_gradient


def move_step_hooks(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
    """Makes `target` call the hooks that are registered with `source`; their handles still remove them.

    Horovod's wrapper is created from parameter groups only, and so calls none of them. PyTorch has no public
    access to an optimizer's hooks: they are the attributes named `_optimizer_*_hooks`.
    """
    for name, hooks in vars(source).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(target, name, hooks)
