"""The global random generators that a sample's augmentation may use: those of torch, numpy and Python."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(word: int) -> None:
    """Seeds torch's CPU generator, numpy's and Python's.

    Args:
        word: in [0, 2⁶⁴).
    """
    # torch.manual_seed would also look for accelerators, at every sample.
    torch.default_generator.manual_seed(word)
    np.random.seed([word & 0xFFFFFFFF, word >> 32])
    random.seed(word)


def seed_generators(seed: int) -> None:
    """Seeds those of `seed_all`, and PyTorch's of all GPUs.

    Args:
        seed: in [0, 2⁶⁴).
    """
    torch.manual_seed(seed)
    seed_all(seed)


@contextmanager
def preserved() -> Iterator[None]:
    """Restores the three generators at the end of the block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
