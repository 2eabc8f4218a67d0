"""The states of the random generators of a rank: PyTorch's on the CPU and on its GPU, NumPy's and Python's."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

RandomState = dict[str, torch.Tensor]


def random_state(device: torch.device) -> RandomState:
    """Returns the states of this process's global generators as uint8 tensors, "cuda" without elements on CPUs.

    Args:
        device: of this rank.
    """
    on_gpu = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else torch.empty(0, dtype=torch.uint8, device="cpu"),
        "numpy": _to_bytes(np.random.get_state(legacy=False)),
        "python": _to_bytes(random.getstate()),
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Restores what `random_state` returned.

    Args:
        state: as returned, on the CPU. Without a GPU's state, that of this rank's GPU is left as it is. The
            training command once saved PyTorch's states only, and None for no GPU.
        device: of this rank.
    """
    torch.set_rng_state(state["cpu"])
    on_gpu = state["cuda"]
    if on_gpu is not None and len(on_gpu) and device.type == "cuda":
        torch.cuda.set_rng_state(on_gpu, device)
    if "numpy" in state:
        np.random.set_state(_from_bytes(state["numpy"]))
        version, numbers, gauss = _from_bytes(state["python"])
        random.setstate((version, tuple(numbers), gauss))


def _to_bytes(value: Any) -> torch.Tensor:
    text = json.dumps(value, default=np.ndarray.tolist)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.tolist()))
