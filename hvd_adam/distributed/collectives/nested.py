"""Nested containers as a list of their numbers and tensors, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from hvd_adam.errors import UserError

Leaf = Tensor | int | float


def leaves(value: Any, path: str = "the value") -> Iterator[tuple[str, Leaf]]:
    """Yields the path and the value of each number and tensor, dictionaries in the order of their sorted keys.

    Numbers of NumPy become Python's.

    Raises:
        UserError: a value is of another type; names its path.
    """
    if isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            yield from leaves(value[key], _join(path, repr(key)))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, _join(path, str(index)))
    elif isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise UserError(f"{path} is a sparse tensor: pass tensor.to_dense()")
        yield path, value
    elif isinstance(value, Integral):
        number = value if isinstance(value, bool) else int(value)
        if not -(2**63) <= number < 2**63:
            raise UserError(f"{path} is {number}, which does not fit into 64 bits: pass a float")
        yield path, number
    elif isinstance(value, Real):
        yield path, float(value)
    else:
        raise UserError(
            f"{path} is of type {type(value).__module__}.{type(value).__qualname__}: pass numbers, tensors, or "
            "dictionaries and lists of them; torch.as_tensor() converts NumPy arrays"
        )


def rebuild(value: Any, take: Callable[[Leaf], Any]) -> Any:
    """Returns containers like those of `value`, with other leaves.

    Args:
        value: nested containers.
        take: gets each leaf, in the order of `leaves`, and returns what to put in its place.
    """
    if isinstance(value, Mapping):
        items = {key: rebuild(value[key], take) for key in sorted(value, key=repr)}
        return {key: items[key] for key in value}
    if isinstance(value, list | tuple):
        built = [rebuild(item, take) for item in value]
        return type(value)(*built) if hasattr(value, "_fields") else type(value)(built)  # named tuples
    return take(value)


def _join(path: str, key: str) -> str:
    return f"value[{key}]" if path == "the value" else f"{path}[{key}]"
