"""``torch.optim.Optimizer`` without decorators that cost time although nothing uses them; what is not compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim import optimizer as torch_optimizer

P = ParamSpec("P")
T = TypeVar("T")


def without_compile_import(decorated: Callable[P, T]) -> Callable[P, T]:
    """Returns a method of PyTorch's optimizer that calls its decorator only where torch.compile is in use.

    The decorator imports all of torch.compile: 1.4 s on every rank at start-up.
    """
    plain = getattr(decorated, "__wrapped__", decorated)

    @functools.wraps(plain)
    def method(*args: P.args, **options: P.kwargs) -> T:
        return (decorated if "torch._dynamo" in sys.modules else plain)(*args, **options)

    return method


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that torch.compile neither traces nor follows: it stops before, and continues behind.

    Optimizers use addresses of tensors and wait for other ranks, which a trace cannot hold. A backward pass that a
    compiled function starts would otherwise have its hooks compiled, one by one for every parameter.
    """
    return without_compile_import(torch._compile._disable_dynamo(function))


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that leaves inference mode, if it is on, for its time.

    What it creates can be updated outside of that mode, and by Horovod's thread, which is not in it.
    """

    @functools.wraps(function)
    def outside(*args: P.args, **options: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **options)
        with torch.inference_mode(False):
            return function(*args, **options)

    return outside


class PlainOptimizer(torch.optim.Optimizer):
    """PyTorch's optimizer; its methods do not import torch.compile, and `step` skips wrappers that do nothing."""

    add_param_group = without_compile_import(torch.optim.Optimizer.add_param_group)
    load_state_dict = without_compile_import(torch.optim.Optimizer.load_state_dict)
    state_dict = without_compile_import(torch.optim.Optimizer.state_dict)
    zero_grad = without_compile_import(torch.optim.Optimizer.zero_grad)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps `step` for hooks and profilers as PyTorch does, but calls it directly where there are none.

        PyTorch's wrapper takes 0.1 ms where caches are cold, as they are after a step over many parameters.
        """
        wrapped = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: PlainOptimizer, *args: Any, **kwargs: Any) -> Any:
            return (wrapped if self._has_observers() else func)(self, *args, **kwargs)

        return not_compiled(step)

    def _has_observers(self) -> bool:
        """Whether step hooks are registered or a profiler is running."""
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        shared = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
        # type: PyTorch itself calls it so, and exports it nowhere.
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        return bool(own or shared or profiled)
