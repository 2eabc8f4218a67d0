"""The data sets by name, their splits, and what ImageData accepts.

Hazards: a split that changes with a version or seed, grey values that lose a level, labels out of range, a class
against the rest mislabelled, statistics that overflow or depend on the machine, data that is not deterministic,
a user's own function that is missing or returns something else, a statistic without effect, a first sample that
cannot be read, torch imported before it is needed.
"""

import hashlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvd_adam.data import DATASETS, Datasets, ImageData, UnreadableSample, load
from hvd_adam.data.images import channel_statistics
from hvd_adam.errors import UserError


def tiny(**changes):
    fields = {
        "name": "tiny",
        "classes": ("a", "b"),
        "train_images": np.zeros((4, 1, 2, 2), np.uint8),
        "train_labels": np.array([0, 1, 0, 1]),
        "test_images": np.zeros((2, 1, 2, 2), np.uint8),
        "test_labels": np.array([0, 1]),
    }
    return ImageData(**{**fields, **changes})


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_digits_are_the_1797_images_split_four_to_one_in_each_class(digits):
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.shape[1:] == (1, 8, 8)
    assert digits.classes == tuple("0123456789")
    for label in range(10):
        test, train = (digits.test_labels == label).sum(), (digits.train_labels == label).sum()
        assert test == (test + train) // 5


def test_the_split_of_digits_never_changes_between_versions(digits):
    # A change of this digest would make accuracies incomparable, and evaluate on images that were trained on.
    digest = hashlib.sha256(digits.test_images.tobytes() + digits.test_labels.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "c828ed8d66d49993"


def test_digits_keep_all_17_grey_levels_evenly_spread(digits):
    levels = np.unique(digits.train_images)
    assert len(levels) == 17 and levels[0] == 0 and levels[-1] == 255
    assert np.abs(levels - np.arange(17) * 255 / 16).max() <= 0.5


def test_a_positive_class_makes_two_classes_and_keeps_the_images(digits):
    two = load("digits", positive_class="3")
    assert two.classes == ("rest", "3")
    assert np.array_equal(two.train_labels == 1, digits.train_labels == 3)
    assert np.array_equal(two.test_labels == 1, digits.test_labels == 3)
    assert np.array_equal(two.train_images, digits.train_images)
    assert two.train_labels.dtype == np.int64


def test_an_unknown_positive_class_is_refused_with_the_classes():
    with pytest.raises(UserError, match=r"'airplane'.*use one of 0, 1, 2"):
        load("digits", positive_class="airplane")


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 32, 32), (4, 5, 7)])
def test_synthetic_has_the_requested_shape_and_is_deterministic(shape):
    wanted = {"synthetic_shape": shape, "synthetic_classes": 3, "synthetic_samples": 50}
    first, second = load("synthetic", **wanted), load("synthetic", **wanted)
    assert first.train_images.shape == (50, *shape) and first.test_images.shape == (10, *shape)
    assert np.array_equal(first.train_images, second.train_images)
    assert np.array_equal(first.test_images, second.test_images)


def test_synthetic_can_be_learned():
    data = load("synthetic", synthetic_shape=(1, 8, 8), synthetic_classes=4, synthetic_samples=200)
    images = data.train_images.reshape(200, -1).astype(np.float64)
    means = np.stack([images[data.train_labels == label].mean(axis=0) for label in range(4)])
    test = data.test_images.reshape(len(data.test_images), 1, -1)
    nearest = ((test - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == data.test_labels).all()


@pytest.mark.parametrize(
    "wrong", [{"synthetic_shape": (3, 0, 8)}, {"synthetic_classes": 1}, {"synthetic_samples": 0}]
)
def test_synthetic_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match="synthetic"):
        load("synthetic", **wrong)


def test_an_unknown_data_set_is_refused_with_similar_names():
    with pytest.raises(UserError, match="'digit' is not known: did you mean digits"):
        load("digit")
    with pytest.raises(UserError, match=r"use one of digits, cifar10, synthetic, or package.module:function"):
        load("imagenet")


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    def write(text):
        name = f"own_{abs(hash((text, str(tmp_path))))}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_a_user_defined_data_set_is_called_with_the_data_folder(own_module, tmp_path):
    module = own_module(
        "import numpy as np\n"
        "from hvd_adam.data import ImageData\n"
        "def images(data_dir):\n"
        "    part = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 1, 0, 1])\n"
        "    return ImageData(str(data_dir), ('a', 'b'), *part, *part)\n"
    )
    assert load(f"{module}:images", data_dir=tmp_path).name == str(tmp_path)


def test_an_invalid_user_defined_data_set_is_refused_in_one_line(own_module):
    module = own_module("number = 3\ndef nothing(data_dir):\n    pass\n")
    for reference, reason in {
        f"{module}:nothing": "returned a NoneType",
        f"{module}:number": "is a int, not a function",
        f"{module}:missing": "no attribute 'missing'",
        "no_such_package.module:function": "cannot import no_such_package.module",
        "module:": "must have the form package.module:function",
        ":function": "must have the form package.module:function",
    }.items():
        with pytest.raises(UserError, match=reason) as refusal:
            load(reference)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ("a",)}, "at least 2"),
        ({"classes": (0, 1)}, r"classes is \(0, 1\)"),
        ({"classes": ("a", "a")}, r"classes is \('a', 'a'\).*different"),
        ({"classes": "ab"}, "classes is 'ab'"),
        ({"train_images": np.zeros((4, 1, 2, 2), np.float32)}, "train images must be .*float32"),
        ({"train_images": np.zeros((4, 2, 2), np.uint8)}, "train images must be"),
        ({"train_images": [[0]]}, "not a list"),
        ({"test_images": np.zeros((0, 1, 2, 2), np.uint8)}, "test images are empty"),
        ({"train_labels": np.array([0, 1, 0])}, "train labels must be .*\\(4,\\)"),
        ({"train_labels": np.array([0, 1, 0, 1], np.int32)}, "train labels must be .*int32"),
        ({"train_labels": np.array([0, 1, 0, 2])}, "run from 0 to 2"),
        ({"test_labels": np.array([-1, 1])}, "run from -1 to 1"),
        ({"test_images": np.zeros((2, 1, 3, 2), np.uint8)}, "must be the same"),
    ],
)
def test_invalid_image_data_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UserError, match=reason):
        tiny(**changes)


STATISTICS = [
    ({"mean": (0.5,)}, "mean is given without std"),
    ({"std": (0.5,)}, "std is given without mean"),
    ({"mean": (0.5,), "std": (0.0,)}, r"std is \(0.0,\): each value must be above 0"),
    ({"mean": (0.5,), "std": (-1.0,)}, r"std is \(-1.0,\)"),
    ({"mean": (float("nan"),), "std": (1.0,)}, r"mean is \(nan,\)"),
    ({"mean": 0.5, "std": 0.5}, "mean is 0.5: it must be a tuple"),
    ({"mean": ("0.5",), "std": (1.0,)}, "mean is .*: it must be a tuple"),
    ({"mean": (0.5,), "std": (1.0, 1.0)}, "mean has 1 values and std 2"),
    ({"mean": (), "std": ()}, "mean has 0 values"),
]


@pytest.mark.parametrize(("statistics", "reason"), STATISTICS)
def test_statistics_that_cannot_normalize_are_refused_with_the_reason(statistics, reason):
    for make in (tiny, lambda **given: Datasets([0], [0], (), "tiny", **given)):
        with pytest.raises(UserError, match=f"data set tiny: {reason}"):
            make(**statistics)


def test_statistics_need_one_value_per_channel_or_one_for_all():
    images = {"train_images": np.zeros((4, 3, 2, 2), np.uint8), "test_images": np.zeros((2, 3, 2, 2), np.uint8)}
    with pytest.raises(UserError, match="mean and std have 2 values, but the images 3 channels"):
        tiny(**images, mean=(0.5, 0.5), std=(1.0, 1.0))
    for count in (1, 3):
        assert tiny(**images, mean=(0.5,) * count, std=(1,) * count).mean == (0.5,) * count


class Samples:
    """Samples of shape (2, 3), of which the first ones cannot be read; counts the reads."""

    def __init__(self, unreadable, count=1000):
        self.unreadable, self.count, self.reads = unreadable, count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        if index < self.unreadable:
            raise UnreadableSample(f"file {index}", "damaged")
        return np.zeros((2, 3), np.float32), 0


@pytest.mark.parametrize("unreadable", [0, 1, 5])
def test_the_shape_of_a_sample_is_that_of_the_first_one_that_can_be_read(unreadable):
    samples = Samples(unreadable)
    assert Datasets(samples, samples, ()).sample_shape == (2, 3)
    assert samples.reads == unreadable + 1


@pytest.mark.parametrize("count", [3, 1000])
def test_the_search_for_a_readable_sample_ends_in_one_line_after_a_few(count):
    samples = Samples(unreadable=count, count=count)
    with pytest.raises(UserError, match=r"data set tiny: none of .* the first is file 0 \(damaged\).*give shape"):
        Datasets(samples, samples, (), "tiny").sample_shape  # noqa: B018
    assert samples.reads == min(count, 32)


@given(
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
)
def test_channel_statistics_are_exact(images):
    means, deviations = channel_statistics(images)
    for channel, (mean, deviation) in enumerate(zip(means, deviations, strict=True)):
        values = [Fraction(int(value), 255) for value in images[:, channel].ravel()]
        exact_mean = sum(values) / len(values)
        exact_variance = sum((value - exact_mean) ** 2 for value in values) / len(values)
        # One correctly rounded division, and a root and a division more: at most 3 units of 2⁻⁵³ each.
        assert mean == pytest.approx(float(exact_mean), rel=4e-16)
        expected = float(exact_variance) ** 0.5 if exact_variance else 1.0
        assert deviation == pytest.approx(expected, rel=8e-16)


def test_channel_statistics_do_not_overflow_on_many_bright_images():
    images = np.full((3000, 1, 64, 64), 255, np.uint8)
    images[0] = 0
    (mean,), (deviation,) = channel_statistics(images)
    assert mean == 2999 / 3000
    assert deviation == pytest.approx((2999 / 3000 / 3000) ** 0.5, rel=1e-15)


def test_data_sets_are_loaded_without_torch():
    program = f"import sys; from hvd_adam.data import load; load({DATASETS[-1]!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
