"""The code that `torch.compile` generates for a function, without the guards that it wraps around it.

On every call the guards check the arguments and the state of the whole process, and recompile where something has
changed. That takes 0.4 ms where caches are cold, as they are after a step over 11 M parameters (6 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def compile_without_guards(one_pass: Callable[..., None], example: Sequence[Tensor | None]) -> Callable[..., None]:
    """Compiles a function for CPUs; the result takes the function's arguments.

    Args:
        one_pass: works in place on 1-dimensional tensors of one length. The length may change from call to call;
            dtypes, the number of tensors and which of them are None may not.
        example: arguments to compile it with, which it changes; the first is a tensor of that length.
    """
    # Here, since importing it takes a second.
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    calls: list[tuple[Any, list[Any]]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        def compile_and_record(*args: Any, **kwargs: Any) -> Callable[[list[Any]], Any]:
            code: Any = compile_fx_inner(*args, **kwargs)

            def recording(arguments: list[Any]) -> Any:
                calls.append((code, [*arguments]))
                return code(arguments)

            recording._boxed_call = True  # type: ignore[attr-defined]  # arguments in one list, which it may empty
            return recording

        # The number of threads is the one at the time of the call, not of the compilation.
        compiler: Any = compile_fx  # its types name classes of one version of PyTorch
        compiled: Callable[..., Any] = compiler(
            graph, examples, compile_and_record, config_patches={"cpp.dynamic_threads": True}
        )
        return compiled

    # With this cache PyTorch would not call `compile_and_record`.
    known = hasattr(config, "enable_autograd_cache")
    with config.patch(enable_autograd_cache=False) if known else nullcontext():
        torch.compile(one_pass, fullgraph=True, dynamic=True, backend=backend)(*example)
    [(code, received)] = calls
    code = getattr(code, "current_callable", None) or code
    places = {tensor.data_ptr(): place for place, tensor in enumerate(example) if tensor is not None}
    # The code takes only the tensors that it uses, in its own order, and the length.
    order = [None if isinstance(argument, int) else places[argument.data_ptr()] for argument in received]

    def kernel(*arguments: Any) -> None:
        length = arguments[0].numel()
        code([length if place is None else arguments[place] for place in order])

    return kernel
