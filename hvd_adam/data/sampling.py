"""The global order of samples, and which of them each rank takes: pure functions of (seed, epoch, step).

Nothing here depends on the number of ranks but the slicing itself: global batch t of an epoch is the same set
of samples, with the same augmentation, at any number of ranks and of accumulated micro-batches. Randomness is
the raw output of the counter-based generator Philox-4x64 (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), whose stream numpy guarantees to stay the same across versions, unlike its shuffles.
"""

import numpy as np

from hvd_adam.errors import UserError

_ORDER, _AUGMENTATION = 0, 1  # the generator's key is (seed, purpose), so the two streams never meet


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of all samples in one epoch: a permutation, int64 of shape ``(num_samples,)``.

    ``seed`` is in [0, 2⁶⁴) and ``epoch`` ≥ 0. Raises UserError for a seed out of range.
    """
    return np.argsort(_raw(seed, _ORDER, epoch, 0, num_samples), kind="stable").astype(np.int64, copy=False)


def augmentation_bits(seed: int, epoch: int, step: int, global_batch_size: int) -> np.ndarray:
    """Return one random 64-bit word for each sample of global batch ``step``: uint64 of shape ``(batch,)``.

    Drawn for the whole global batch; each rank takes the slice that ``share`` names.
    """
    return _raw(seed, _AUGMENTATION, epoch, step, global_batch_size)


def _raw(seed: int, purpose: int, epoch: int, step: int, count: int) -> np.ndarray:
    if not 0 <= seed < 2**64:
        raise UserError(f"the seed {seed} must be at least 0 and below 2^64")
    # Only counter word 0 advances while drawing, so every (step, epoch) has a stream of its own.
    counter = np.array([0, 0, step, epoch], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(count)


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Return the number of whole global batches in an epoch.

    The last, incomplete batch is dropped: all updates average over the same number of samples, and as the
    order changes with the epoch, a different random remainder is left out each time. Raises UserError where
    not even one batch is whole.
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
    """Return the contiguous part of a global batch that one rank takes in one micro-batch.

    Over all ranks in [0, size) and micro-batches in [0, accumulate) the slices cover the batch exactly once.
    Where it does not divide, their lengths differ by at most one. Raises UserError where one would be empty.
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
    """Return a rank's samples of global batch ``step`` in one micro-batch: a view of ``order``.

    ``order`` is what ``epoch_order`` returned. Raises UserError as ``share`` and ``steps_per_epoch`` do, and
    IndexError for a step that the epoch does not have.
    """
    steps = steps_per_epoch(len(order), global_batch_size)
    if not 0 <= step < steps:
        raise IndexError(f"step {step} is not in an epoch of {steps} steps")
    batch = order[step * global_batch_size : (step + 1) * global_batch_size]
    return batch[share(global_batch_size, rank=rank, size=size, micro_batch=micro_batch, accumulate=accumulate)]


def evaluation_share(num_samples: int, rank: int, size: int) -> range:
    """Return the consecutive samples that one rank evaluates.

    Over all ranks every sample comes exactly once; shares differ by at most one sample and may be empty.
    """
    return range(num_samples * rank // size, num_samples * (rank + 1) // size)
