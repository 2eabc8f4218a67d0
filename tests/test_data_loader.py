"""Batches made on the device.

Hazards: a batch or its augmentation that depends on the number of ranks or of micro-batches, an epoch that resumes
elsewhere than it stopped, a label that parts from its image, a test sample counted twice or never, a crop one
pixel off, a division by a deviation of 0, statistics that differ between ranks, a precision lost before
normalising, an array of the user's that is changed or cannot be read.
"""

import mmap
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_adam.data import ImageData, load
from hvd_adam.data.loader import DeviceLoader, crop_and_flip
from hvd_adam.data.normalize import Normalization
from hvd_adam.errors import UserError


def numbered(samples=48, *, augment=False, side=8, channels=2):
    """Random images, each labelled with its own index, so that a batch shows which samples it holds."""
    images = np.random.default_rng(0).integers(0, 256, (samples, channels, side, side)).astype(np.uint8)
    labels = np.arange(samples)
    classes = tuple(str(label) for label in labels)
    return ImageData("numbered", classes, images, labels, images[:7], labels[:7], augment=augment)


def joined(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@given(
    size=st.sampled_from([1, 2, 3, 4]),
    accumulate=st.sampled_from([1, 2]),
    augment=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_any_number_of_ranks_and_micro_batches_sees_the_same_global_batches(
    size, accumulate, augment, seed, epoch
):
    loader = DeviceLoader(numbered(50, augment=augment), torch.device("cpu"))
    expected = list(loader.train_batches(seed, epoch, global_batch_size=24))
    assert len(expected) == loader.steps_per_epoch(24) == 2
    by_rank = [
        list(loader.train_batches(seed, epoch, global_batch_size=24, rank=rank, size=size, accumulate=accumulate))
        for rank in range(size)
    ]
    for step, (images, labels) in enumerate(expected):
        micro_batches = slice(step * accumulate, (step + 1) * accumulate)
        parts = [part for batches in by_rank for part in batches[micro_batches]]
        assert {len(part_labels) for _, part_labels in parts} == {24 // (size * accumulate)}
        all_images, all_labels = joined(parts)
        assert torch.equal(all_images, images) and torch.equal(all_labels, labels)


@pytest.mark.parametrize("augment", [False, True])
def test_an_epoch_can_be_started_at_any_step(augment):
    loader = DeviceLoader(numbered(augment=augment), torch.device("cpu"))
    options = {"global_batch_size": 8, "rank": 1, "size": 2, "accumulate": 2}
    whole = list(loader.train_batches(3, 4, **options))
    for first_step in (0, 1, 5, 6):
        rest = list(loader.train_batches(3, 4, first_step=first_step, **options))
        assert len(rest) == 2 * (6 - first_step)
        for (images, labels), (expected_images, expected_labels) in zip(
            rest, whole[2 * first_step :], strict=True
        ):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_images_are_normalized_and_stay_with_their_labels():
    data = numbered()
    loader = DeviceLoader(data, torch.device("cpu"), dtype=torch.float64)
    images, labels = joined(loader.train_batches(0, 0, global_batch_size=16))
    assert images.dtype == torch.float64 and labels.dtype == torch.int64
    assert sorted(labels.tolist()) == list(range(48))
    mean, std = (np.array(values).reshape(1, -1, 1, 1) for values in (loader.mean, loader.std))
    expected = (data.train_images[labels] / 255 - mean) / std
    # Values up to about 2, a handful of float64 operations: 1e-14 is some 20 roundings.
    np.testing.assert_allclose(images.numpy(), expected, rtol=0, atol=1e-14)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-13
    assert (images.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-13


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-8)])
def test_a_lower_precision_rounds_the_normalized_image_not_the_pixels(dtype, unit):
    data = numbered()
    exact = joined(DeviceLoader(data, torch.device("cpu"), dtype=torch.float64).test_batches(3))[0]
    rounded = joined(DeviceLoader(data, torch.device("cpu"), dtype=dtype).test_batches(3))[0]
    assert rounded.dtype == dtype
    # float32 subtracts numbers up to 255, whose rounding the deviation (74 grey levels) scales down: 4 units; one
    # more rounding to the dtype itself.
    assert (rounded.double() - exact).abs().max() <= 4 * 2 * 2**-24 + 2 * unit


def test_channels_last_changes_only_the_memory_format():
    data = numbered(augment=True, channels=3)
    plain = DeviceLoader(data, torch.device("cpu"))
    last = DeviceLoader(data, torch.device("cpu"), channels_last=True)
    for (images, _), (expected, _) in zip(
        [*last.train_batches(0, 0, global_batch_size=8), *last.test_batches(4)],
        [*plain.train_batches(0, 0, global_batch_size=8), *plain.test_batches(4)],
        strict=True,
    ):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected)


def test_statistics_can_be_given_as_a_checkpoint_holds_them():
    data = numbered()
    own = DeviceLoader(data, torch.device("cpu"))
    again = DeviceLoader(data, torch.device("cpu"), mean=own.mean, std=own.std)
    assert (again.mean, again.std) == (own.mean, own.std)
    shifted = DeviceLoader(data, torch.device("cpu"), mean=(0.0, 0.0), std=(1.0, 1.0))
    images, _ = next(shifted.test_batches(7))
    assert torch.allclose(images * 255, torch.from_numpy(data.test_images).float(), rtol=1e-6)


def test_given_statistics_that_cannot_normalize_are_refused():
    for statistics, reason in (
        ({"mean": (0.5, 0.5)}, "mean is given without std"),
        ({"mean": (0.5, 0.5), "std": (1.0, 0.0)}, "must be above 0"),
        ({"mean": (0.5,) * 3, "std": (1.0,) * 3}, "3 values, but the images 2 channels"),
    ):
        with pytest.raises(UserError, match=f"data set numbered: .*{reason}"):
            DeviceLoader(numbered(), torch.device("cpu"), **statistics)


@pytest.mark.parametrize(("count", "shape"), [(2, (4, 3, 8, 8)), (3, (4, 1, 8, 8)), (1, (4, 12))])
def test_images_of_other_channels_than_the_statistics_are_refused(count, shape):
    values = (0.5,) * count
    normalize = Normalization(values, values, torch.device("cpu"), torch.float32, torch.contiguous_format)
    with pytest.raises(UserError, match=f"have {count} values, but its uint8 inputs have shape"):
        normalize(torch.zeros(shape, dtype=torch.uint8))


def test_a_constant_channel_becomes_zero_and_not_nan():
    black = np.zeros((4, 1, 2, 2), np.uint8)
    data = ImageData("black", ("a", "b"), black, np.zeros(4, np.int64), black, np.zeros(4, np.int64))
    images, _ = next(DeviceLoader(data, torch.device("cpu")).test_batches(4))
    assert (images == 0).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_every_test_sample_is_yielded_once_at_any_number_of_ranks(size):
    loader = DeviceLoader(numbered(augment=True), torch.device("cpu"))
    shares = [list(loader.test_batches(2, rank=rank, size=size)) for rank in range(size)]
    labels = [label for share in shares for _, labels in share for label in labels.tolist()]
    assert labels == list(range(7))
    assert all(len(labels) <= 2 for share in shares for _, labels in share)


def crop_one(image, top, left, flip, padding):
    """The slow and obvious way, for one image."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[1:]
    cropped = padded[:, top : top + height, left : left + width]
    return cropped[:, :, ::-1] if flip else cropped


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_crop_and_flip_agree_with_one_image_at_a_time(data):
    count, height, width, padding = (data.draw(st.integers(1, 6)) for _ in range(4))
    images = np.random.default_rng(0).integers(0, 256, (count, 2, height, width)).astype(np.uint8)
    places = st.lists(st.integers(0, 2 * padding), min_size=count, max_size=count)
    top, left = data.draw(places), data.draw(places)
    flip = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    batch = crop_and_flip(
        torch.tensor(images), torch.tensor(top), torch.tensor(left), torch.tensor(flip), padding=padding
    )
    expected = np.stack([crop_one(*one, padding) for one in zip(images, top, left, flip, strict=True)])
    assert np.array_equal(batch.numpy(), expected)


def test_augmentation_draws_every_place_and_both_directions_about_equally_often():
    # White images on a black ground show where they were cut: the black rows and columns give the place away.
    white = np.full((8100, 1, 9, 9), 255, np.uint8)
    white[:, :, :, 0] = 128  # a grey left edge gives the direction away
    labels = np.zeros(len(white), np.int64)
    data = ImageData("white", ("a", "b"), white, labels, white[:1], labels[:1], augment=True)
    loader = DeviceLoader(data, torch.device("cpu"), mean=(0.0,), std=(1.0,))
    images, _ = next(loader.train_batches(0, 0, global_batch_size=8100))
    rows = (images.amax(dim=(1, 3)) > 0).int()
    top = torch.where(rows[:, 0] == 1, 9 - rows.sum(dim=1), rows.sum(dim=1) - 9)
    counts = torch.bincount(top + 4, minlength=9)
    # Each place is binomial with mean 900 and deviation √(8100 · 1/9 · 8/9) ≈ 28: six deviations are 170.
    assert (counts - 900).abs().max() < 170
    centred = images[:, 0, 4, :]
    has_edge = (centred > 0.4) & (centred < 0.6)
    kept = has_edge.any(dim=1)
    on_the_right = has_edge[kept].float().argmax(dim=1) > (centred[kept] > 0.9).float().argmax(dim=1)
    # Half of about 4500, deviation 34.
    assert abs(on_the_right.float().mean() - 0.5) < 6 * 34 / kept.sum()


def test_test_images_are_never_augmented():
    data = numbered(augment=True)
    loader = DeviceLoader(data, torch.device("cpu"), mean=(0.0, 0.0), std=(1.0, 1.0), dtype=torch.float64)
    images, _ = next(loader.test_batches(7))
    assert np.array_equal((images * 255).round().numpy(), data.test_images)


def test_batches_of_invalid_size_are_refused():
    loader = DeviceLoader(numbered(), torch.device("cpu"))
    with pytest.raises(UserError, match="larger than the 48"):
        next(loader.train_batches(0, 0, global_batch_size=64))
    with pytest.raises(UserError, match="too small for 3 ranks"):
        next(loader.train_batches(0, 0, global_batch_size=2, size=3))


@pytest.mark.parametrize("crop", [None, 5])
def test_reversed_views_give_the_batches_of_their_copies(crop):
    data = numbered(channels=3)
    views = {"train_images": data.train_images[:, ::-1], "test_images": data.test_images[::-1, :, :, ::-1]}
    views |= {"train_labels": data.train_labels[::-1], "test_labels": data.test_labels[::-1]}
    copies = {name: view.copy() for name, view in views.items()}
    view, copy = (
        DeviceLoader(replace(data, crop=crop, **arrays), torch.device("cpu")) for arrays in (views, copies)
    )
    for read in (lambda it: it.train_batches(0, 0, global_batch_size=16), lambda it: it.test_batches(4)):
        for ours, theirs in zip(joined(read(view)), joined(read(copy)), strict=True):
            assert torch.equal(ours, theirs)


UNCHANGED = {"mean": (0.0,), "std": (1.0,)}


def mapped(kind, path, pixels):
    """Returns an array in a map that holds `pixels`; the file below it, if there is one, has other values."""
    if kind == "anonymous":
        array = np.ndarray(pixels.shape, np.uint8, mmap.mmap(-1, pixels.nbytes, flags=mmap.MAP_PRIVATE))
    else:
        (pixels if kind == "r" else 255 - pixels).tofile(path)
        array = np.memmap(path, np.uint8, kind, shape=pixels.shape)
    if kind != "r":
        array[:] = pixels
    return array


@pytest.mark.parametrize("kind", ["c", "anonymous", "r", "r+"])
def test_crops_leave_the_pixels_of_a_map_as_they_are(kind, tmp_path):
    data = numbered(side=64)  # several pages of memory
    images = mapped(kind, tmp_path / "images", data.train_images)
    data = replace(data, crop=32)
    loaders = [
        DeviceLoader(samples, torch.device("cpu"), **UNCHANGED)
        for samples in (replace(data, train_images=images), data)
    ]
    ours, expected = (joined(loader.train_batches(0, 0, global_batch_size=16)) for loader in loaders)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert np.array_equal(images, data.train_images)


def test_pages_of_a_read_only_map_do_not_stay_in_memory_of_the_process(tmp_path):
    data = numbered(side=64)
    images = mapped("r", tmp_path / "images", data.train_images)
    loader = DeviceLoader(replace(data, train_images=images, crop=32), torch.device("cpu"), **UNCHANGED)
    joined(loader.train_batches(0, 0, global_batch_size=16))
    own = Path("/proc/self/smaps").read_text().split(f"{tmp_path}/images\n")[1]
    assert re.search(r"^Rss: +(\d+) kB", own, re.MULTILINE)[1] == "0"


def test_batches_do_not_alias_the_data():
    data = load("synthetic", synthetic_shape=(1, 4, 4), synthetic_classes=2, synthetic_samples=8)
    before = data.test_images.copy()
    loader = DeviceLoader(data, torch.device("cpu"))
    for images, _ in [*loader.train_batches(0, 0, global_batch_size=4), *loader.test_batches(4)]:
        images.zero_()
    assert np.array_equal(data.test_images, before)
    again, _ = next(loader.test_batches(4))
    assert again.abs().max() > 0
