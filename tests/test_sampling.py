"""The order of samples and each rank's share of it.

Hazards: a sample twice or never, an order that depends on the number of ranks or on numpy's version, streams of
random numbers that coincide, a share that is empty, or larger than another by more than one sample.
"""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_adam.data import sampling
from hvd_adam.errors import UserError

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 10_000)


@given(num_samples=st.integers(1, 500), seed=seeds, epoch=epochs)
def test_an_epochs_order_holds_every_sample_once(num_samples, seed, epoch):
    order = sampling.epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_samples))


def test_the_order_never_changes_between_versions():
    # A change of this digest would change every run and break the resumption of older ones.
    digest = hashlib.sha256(sampling.epoch_order(10_000, seed=1, epoch=2).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "52dbaad78196a624"


def test_orders_of_other_seeds_and_epochs_differ():
    orders = [tuple(sampling.epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25


def test_each_place_gets_each_sample_equally_often():
    samples, draws = 10, 4000
    counts = np.zeros((samples, samples))
    for epoch in range(draws):
        counts[np.arange(samples), sampling.epoch_order(samples, 7, epoch)] += 1
    expected = draws / samples
    # Chi-squared with 9·9 degrees of freedom: mean 81, deviation √162 ≈ 12.7; six deviations above is 158.
    assert ((counts - expected) ** 2 / expected).sum() < 158


@st.composite
def divided_batches(draw):
    size, accumulate = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    batch = draw(st.integers(size * accumulate, 5 * size * accumulate))
    return size, accumulate, batch, draw(st.integers(batch, 4 * batch))


@given(divided=divided_batches(), seed=seeds, epoch=epochs)
def test_all_shares_together_are_the_global_batch_at_any_number_of_ranks(divided, seed, epoch):
    size, accumulate, batch, num_samples = divided
    order = sampling.epoch_order(num_samples, seed, epoch)
    for step in range(sampling.steps_per_epoch(num_samples, batch)):
        shares = [
            sampling.batch_share(
                order,
                step,
                global_batch_size=batch,
                rank=rank,
                size=size,
                micro_batch=micro_batch,
                accumulate=accumulate,
            )
            for rank in range(size)
            for micro_batch in range(accumulate)
        ]
        lengths = {len(part) for part in shares}
        assert lengths <= {batch // (size * accumulate), -(-batch // (size * accumulate))}
        one_rank = sampling.batch_share(order, step, global_batch_size=batch, rank=0, size=1)
        assert np.array_equal(np.concatenate(shares), one_rank)


def test_an_epoch_uses_no_sample_twice_and_drops_less_than_a_batch():
    order = sampling.epoch_order(103, 0, 0)
    used = [
        sampling.batch_share(order, step, global_batch_size=20, rank=rank, size=2)
        for step in range(sampling.steps_per_epoch(103, 20))
        for rank in range(2)
    ]
    assert len(np.concatenate(used)) == len(set(np.concatenate(used))) == 100


def test_each_epoch_drops_other_samples():
    remainders = {tuple(sorted(sampling.epoch_order(103, 0, epoch)[100:])) for epoch in range(10)}
    assert len(remainders) == 10


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"global batch of 128 .* 100 training samples.*lower"):
        sampling.steps_per_epoch(100, 128)


def test_a_batch_with_an_empty_share_is_refused():
    with pytest.raises(UserError, match=r"batch of 5 images is too small for 3 ranks x 2 .*raise"):
        sampling.share(5, rank=0, size=3, accumulate=2)


def test_a_step_past_the_epoch_is_an_error_not_an_empty_batch():
    with pytest.raises(IndexError, match="step 5"):
        sampling.batch_share(np.arange(50), 5, global_batch_size=10, rank=0, size=1)


@given(num_samples=st.integers(0, 300), size=st.integers(1, 40))
def test_evaluation_counts_each_sample_once_in_nearly_even_shares(num_samples, size):
    shares = [sampling.evaluation_share(num_samples, rank, size) for rank in range(size)]
    assert [index for part in shares for index in part] == list(range(num_samples))
    lengths = [len(part) for part in shares]
    assert max(lengths) - min(lengths) <= 1


@given(seed=seeds, epoch=epochs, step=st.integers(0, 10**6), batch=st.integers(1, 64))
def test_augmentation_depends_on_seed_epoch_and_step_but_not_on_the_batch_size(seed, epoch, step, batch):
    bits = sampling.augmentation_bits(seed, epoch, step, batch)
    assert bits.dtype == np.uint64 and len(bits) == batch
    assert np.array_equal(bits, sampling.augmentation_bits(seed, epoch, step, 64)[:batch])


def test_no_two_streams_of_random_numbers_coincide():
    words = [
        word
        for seed in range(3)
        for epoch in range(3)
        for step in range(3)
        for word in sampling.augmentation_bits(seed, epoch, step, 32)
    ]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(UserError, match="seed"):
        sampling.epoch_order(10, seed, 0)
