"""The global order of samples and each rank's share of it, as pure functions of (seed, epoch, step).

Only the slicing depends on the number of ranks: global batch t of an epoch is the same set of samples, with the
same augmentation, at any number of ranks and of accumulated micro-batches. The random numbers are the raw output
of the counter-based generator Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
which numpy guarantees to be the same in all versions, unlike its shuffles.
"""

import numpy as np

from hvd_adam.errors import UserError

# The generator's key is (seed, purpose), so the streams never overlap.
_ORDER, _AUGMENTATION, _EVALUATION, _TRANSFORM, _MIXUP = 0, 1, 2, 8, 9


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of all samples in one epoch: a permutation, int64 of shape `(num_samples,)`.

    Args:
        num_samples: ≥ 0.
        seed: in [0, 2⁶⁴).
        epoch: ≥ 0.

    Raises:
        UserError: the seed is out of range.
    """
    return np.argsort(_raw(seed, _ORDER, epoch, 0, num_samples), kind="stable").astype(np.int64, copy=False)


def augmentation_bits(seed: int, epoch: int, step: int, global_batch_size: int) -> np.ndarray:
    """Returns a random word for each sample of a global batch: uint64 of shape `(global_batch_size,)`.

    Each rank takes the slice that `share` returns.

    Args:
        seed: in [0, 2⁶⁴).
        epoch: ≥ 0.
        step: index of the global batch in the epoch.
        global_batch_size: samples per update over all ranks.
    """
    return _raw(seed, _AUGMENTATION, epoch, step, global_batch_size)


def evaluation_bits(num_samples: int) -> np.ndarray:
    """Returns a word for each test sample, which seeds what is random in it: uint64 of shape `(num_samples,)`.

    It depends on the sample only, so that all evaluations, at any number of ranks, see the same samples.

    Args:
        num_samples: of the test set.
    """
    return _raw(0, _EVALUATION, 0, 0, num_samples)


def transform_seeds(seed: int, epoch: int, step: int, global_batch_size: int) -> np.ndarray:
    """As `augmentation_bits`, for the random numbers of the user's own transform."""
    return _raw(seed, _TRANSFORM, epoch, step, global_batch_size)


def mixup_weights(seed: int, epoch: int, step: int, global_batch_size: int, alpha: float) -> np.ndarray:
    """Returns a number drawn from Beta(α, α) for each sample of a global batch: float64, `(global_batch_size,)`.

    Each rank takes the slice that `share` returns. The draws are numpy's, which another version may change.

    Args:
        seed: as for `augmentation_bits`.
        epoch: as for `augmentation_bits`.
        step: as for `augmentation_bits`.
        global_batch_size: as for `augmentation_bits`.
        alpha: α > 0.
    """
    return np.random.Generator(_stream(seed, _MIXUP, epoch, step)).beta(alpha, alpha, global_batch_size)


def _raw(seed: int, purpose: int, epoch: int, step: int, count: int) -> np.ndarray:
    return _stream(seed, purpose, epoch, step).random_raw(count)


def _stream(seed: int, purpose: int, epoch: int, step: int) -> np.random.Philox:
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} must be at least 0 and below 2^64")
    # Only counter word 0 advances while drawing, so every (step, epoch) has a stream of its own.
    counter = np.array([0, 0, step, epoch], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key)


def number_of_updates(epochs: int, steps_per_epoch: int, max_steps: int | None) -> int:
    """Returns the number of updates of a run; `max_steps` limits it unless it is None."""
    updates = epochs * steps_per_epoch
    return updates if max_steps is None else min(updates, max_steps)


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Returns the number of complete global batches in an epoch.

    The last, incomplete batch is dropped, so that all updates average over the same number of samples. The order
    changes with the epoch, so a different random remainder is dropped each time.

    Args:
        num_samples: of the data set.
        global_batch_size: samples per update over all ranks, ≥ 1.

    Raises:
        UserError: not even one batch is complete.
    """
    if global_batch_size < 1:
        raise UserError(f"the global batch size {global_batch_size} must be at least 1")
    if global_batch_size > num_samples:
        raise UserError(
            f"the global batch of {global_batch_size} samples (batch size x ranks x accumulated "
            f"micro-batches) is larger than the {num_samples} training samples: lower the batch size, the "
            "number of ranks or the accumulation"
        )
    return num_samples // global_batch_size


def share(global_batch_size: int, *, rank: int, size: int, micro_batch: int = 0, accumulate: int = 1) -> slice:
    """Returns the contiguous slice of a global batch that one rank takes in one micro-batch.

    The slices of all ranks and micro-batches cover the batch exactly once; their lengths differ by at most one.

    Args:
        global_batch_size: samples per update over all ranks.
        rank: 0 ≤ rank < size.
        size: number of ranks.
        micro_batch: 0 ≤ micro_batch < accumulate.
        accumulate: micro-batches per update and rank.

    Raises:
        UserError: a slice would be empty.
    """
    parts = size * accumulate
    if not 1 <= parts <= global_batch_size:
        raise UserError(
            f"a global batch of {global_batch_size} images is too small for {size} ranks x {accumulate} "
            "accumulated micro-batches: raise --global-batch-size, or use fewer of either"
        )
    part = rank * accumulate + micro_batch
    return slice(global_batch_size * part // parts, global_batch_size * (part + 1) // parts)


def batch_share(
    order: np.ndarray,
    step: int,
    *,
    global_batch_size: int,
    rank: int,
    size: int,
    micro_batch: int = 0,
    accumulate: int = 1,
) -> np.ndarray:
    """Returns a rank's samples in one micro-batch of a global batch: a view of `order`.

    Args:
        order: from `epoch_order`.
        step: index of the global batch in the epoch.
        global_batch_size: as for `share`.
        rank: as for `share`.
        size: as for `share`.
        micro_batch: as for `share`.
        accumulate: as for `share`.

    Raises:
        UserError: as for `share` and `steps_per_epoch`.
        IndexError: the epoch has no such step.
    """
    steps = steps_per_epoch(len(order), global_batch_size)
    if not 0 <= step < steps:
        raise IndexError(f"step {step} is not in an epoch of {steps} steps")
    batch = order[step * global_batch_size : (step + 1) * global_batch_size]
    return batch[share(global_batch_size, rank=rank, size=size, micro_batch=micro_batch, accumulate=accumulate)]


def evaluation_share(num_samples: int, rank: int, size: int) -> range:
    """Returns the consecutive samples that one rank evaluates.

    All ranks together evaluate every sample exactly once; shares differ by at most one sample and may be empty.

    Args:
        num_samples: of the test set.
        rank: 0 ≤ rank < size.
        size: number of ranks.
    """
    return range(num_samples * rank // size, num_samples * (rank + 1) // size)
