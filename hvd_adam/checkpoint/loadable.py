"""`loadable`: only values that `torch.load(…, weights_only=True)` can read get into a checkpoint."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from hvd_adam.distributed.broadcast.tensors import with_versions
from hvd_adam.errors import UserError

# What weights_only=True reads, as exact types: it refuses classes derived from them.
_PLAIN: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, bytearray)
_PLAIN += (torch.Size, torch.dtype, torch.device)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_REMEDIES: tuple[tuple[type, str], ...] = (
    (np.ndarray, "convert it by torch.from_numpy()"),
    (PurePath, "convert it by str()"),
    (Enum, "save its .value"),
    (str, "convert it by str()"),
    (int, "convert it by int()"),
    (float, "convert it by float()"),
    (tuple, "convert it by tuple()"),
    (torch.Tensor, "convert it to a plain torch.Tensor"),
)


def loadable(value: Any, key: str = "") -> Any:
    """Returns a value that a checkpoint may hold, with NumPy's scalars converted to Python's numbers and strings.

    Allowed are None, bool, int, float, complex, str, bytes, tensors, torch.Size, torch.dtype and torch.device, and
    dictionaries, lists, tuples and sets of those. A defaultdict becomes a dictionary, and so does an OrderedDict,
    unless it is the state dictionary of a model.

    Args:
        value: is not changed. Tensors are not copied, containers are.
        key: its place in the checkpoint, for messages.

    Raises:
        UserError: another value is in it; names its key, its type and the remedy.
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = type(value)
    if kind in _PLAIN or kind in _TENSORS:
        return value
    try:
        if kind in (dict, OrderedDict, defaultdict, Counter):
            items = {_key(name, key): loadable(item, _join(key, name)) for name, item in value.items()}
            return Counter(items) if kind is Counter else with_versions(value, items)
        if kind in (list, tuple):
            return kind(loadable(item, _join(key, index)) for index, item in enumerate(value))
        if kind is set:
            return {loadable(item, key) for item in value}
    except RecursionError:
        raise UserError(f"{key or 'the state'} cannot be saved: it contains itself") from None
    raise _refusal(value, key)


def _key(name: Any, place: str) -> Any:
    if type(name) in (str, int):  # nearly all
        return name
    if isinstance(name, tuple | np.generic) or type(name) in _PLAIN:
        return loadable(name, f"a key of {place or 'the state'}")
    raise _refusal(name, f"a key of {place or 'the state'}")


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _refusal(value: Any, key: str) -> UserError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    remedy = next((remedy for base, remedy in _REMEDIES if isinstance(value, base)), "")
    if not remedy:
        mapping = isinstance(value, Mapping)
        remedy = "convert it by dict()" if mapping else "save numbers, strings, tensors, or its state_dict()"
    return UserError(
        f"{key or 'the state'} cannot be saved: plain PyTorch could not load a {kind} again; {remedy}"
    )
