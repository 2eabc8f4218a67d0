"""Which samples a `Subset` has, such as a part of `random_split`: ranks with other ones would mix the parts."""

import hashlib

import numpy as np
from torch.utils.data import Subset


def chosen_samples(dataset: object) -> str:
    """Returns a checksum of the indices of a `Subset`, and of those that it is a subset of; empty for other data.

    Args:
        dataset: of any class.
    """
    digest = hashlib.sha256()
    is_subset = isinstance(dataset, Subset)
    while isinstance(dataset, Subset):
        digest.update(np.asarray(dataset.indices, dtype=np.int64).tobytes())
        dataset = dataset.dataset
    return digest.hexdigest()[:16] if is_subset else ""
