"""Data sets that are not what a run expects: other sizes, images or layouts.

Hazards: a resume after images were added (an index past the epoch) or removed (a run that ends at once, exit 0);
images that were replaced by as many others; ranks that load different images; channels that are taken for rows;
a split at random that is another one on each rank, or in a resumed run, so that test samples are trained on.
"""

import json

import numpy as np
import pytest
import torch
from helpers.forked_commands import ForkedCommands
from helpers.on_ranks import on_ranks
from helpers.training_runs import checkpoint, events, one_line, succeeded, train
from torch.utils.data import Subset, TensorDataset

from hvd_adam.checkpoint.state import Progress, TrainingState
from hvd_adam.data import Datasets, ImageData, UnreadableSample, load
from hvd_adam.data.own import checked
from hvd_adam.distributed.agreement import require_same
from hvd_adam.errors import CollectiveError, UserError
from hvd_adam.training.run import BatchSizes

DATA = """
import os
import numpy as np
from hvd_adam.data import ImageData

def load(data_dir):
    count = int(os.environ.get("IMAGES", "128"))
    random = np.random.default_rng(int(os.environ.get("SEED", "0")))
    images = random.integers(0, 256, (count + 20, 1, 4, 4), dtype=np.uint8)
    if "SWAP" in os.environ:
        images[[20, 22]] = images[[22, 20]]  # of the same class
    labels = np.arange(count + 20) % 2
    return ImageData("grown", ("a", "b"), images[20:], labels[20:], images[:20], labels[:20])
"""
OPTIONS = "--dataset grown:load --model mlp --batch-size 32 --log-every 1 --epochs 3 --output-dir run".split()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with ForkedCommands(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture
def stopped(commands, tmp_path):
    """A folder with a run of 3 epochs of 4 updates that was ended after 6 updates."""
    (tmp_path / "grown.py").write_text(DATA)
    argv = [*OPTIONS, "--max-steps", 6, "--lr-decay", "constant"]
    succeeded(commands.run("hvd_adam.train", *argv, cwd=tmp_path))
    return tmp_path


def resume(commands, folder, *argv, **environ):
    return commands.run("hvd_adam.train", *OPTIONS, "--lr-decay", "constant", *argv, cwd=folder, **environ)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"IMAGES": "512"}, "the number of training images is 512, but 128 in checkpoint"),
        ({"IMAGES": "40"}, "the number of training images is 40, but 128 in checkpoint"),
        ({"SEED": "1"}, "the mean of the training images is"),
        ({"SWAP": "1"}, "the fingerprint of the training images is"),
    ],
)
def test_a_data_set_that_has_changed_is_refused_in_one_line_with_the_option(environ, words, commands, stopped):
    before = (stopped / "run" / "metrics.jsonl").read_text()
    line = one_line(resume(commands, stopped, **environ))
    assert words in line and "--allow-data-change" in line
    assert (stopped / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(("images", "epochs"), [(512, [1] * 10 + [2] * 16 + [3] * 16), (40, []), (64, [])])
def test_a_changed_data_set_that_is_allowed_continues_after_the_same_updates(images, epochs, commands, stopped):
    done = succeeded(resume(commands, stopped, "--allow-data-change", IMAGES=str(images)))
    later = [event for event in events(stopped / "run", "step") if event["step"] > 6]
    assert [event["epoch"] for event in later] == epochs
    assert "resuming after 6 updates" in done.stdout
    state = checkpoint(stopped / "run")
    assert state["data"]["train_images"] == images
    assert state["progress"]["step"] == max(6, 3 * (images // 32))
    succeeded(resume(commands, stopped, IMAGES=str(images)))  # the new images are those of the run from here on


def test_the_same_data_resumes_without_the_option(commands, stopped):
    succeeded(resume(commands, stopped))
    assert checkpoint(stopped / "run")["progress"]["step"] == 12


def test_a_checkpoint_without_a_fingerprint_is_compared_by_its_channel_means():
    own = {"classes": ["a"], "mean": [0.5], "train_images": 9, "test_images": 3, "fingerprint": "00"}
    state = TrainingState({}, {}, None, {}, {}, [], {}, {"classes": ["a"], "mean": [0.25], "std": [1.0]})
    with pytest.raises(UserError, match=r"mean of the training images is \[0.5\], but \[0.25\] in .*--allow-data"):
        state.require_same_data(own, "old")
    state.require_same_data(own, "old", allow_change=True)
    state.require_same_data({**own, "mean": [0.25]}, "old")
    with pytest.raises(UserError, match="the list of classes is"):
        state.require_same_data({**own, "classes": ["b"]}, "old", allow_change=True)


@pytest.mark.parametrize(
    ("steps_per_epoch", "saved", "resumed"),
    [
        (4, (6, 2, False), (6, 2, False)),
        (4, (8, 2, True), (8, 2, True)),
        (5, (8, 2, True), (8, 2, False)),  # that epoch has more updates now
        (16, (8, 2, True), (8, 1, False)),
        (2, (7, 2, False), (7, 4, False)),
        (4, (0, 1, False), (0, 1, False)),
    ],
)
def test_progress_is_counted_in_epochs_of_the_data_as_it_is(steps_per_epoch, saved, resumed):
    sizes = BatchSizes(32, 32, 1, steps_per_epoch, 100 * steps_per_epoch)
    step, epoch, done = saved
    progress = sizes.resumed(Progress(step=step, epoch=epoch, epoch_done=done))
    assert (progress.step, progress.epoch, progress.epoch_done) == resumed


@on_ranks(2)
def test_ranks_with_different_images_are_refused(cluster):
    with pytest.raises(CollectiveError, match="different data: fingerprint is '0' on rank 0 and '1' on rank 1"):
        require_same(cluster, "data", {"fingerprint": str(cluster.rank)})


def images_of(shape):
    images, labels = np.zeros((4, *shape), np.uint8), np.zeros(4, np.int64)
    return ImageData("some", ("a", "b"), images, labels, images[:2], labels[:2])


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (32, 48, 3), (224, 224, 4), (8, 8, 2)])
def test_images_with_their_channels_last_are_refused_with_shape_and_remedy(shape):
    with pytest.raises(UserError) as refusal:
        images_of(shape)
    assert str((4, *shape)) in str(refusal.value) and "images.transpose(0, 3, 1, 2)" in str(refusal.value)
    images_of((shape[2], *shape[:2]))


@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (1, 1, 13), (13, 1, 1), (64, 1000, 1), (3, 3, 3), (1, 5, 3), (12, 32, 32), (4, 64, 4)]
)
def test_other_shapes_are_accepted(shape):
    images_of(shape)


def test_the_first_line_of_a_run_shows_the_data(commands, stopped):
    done = resume(commands, stopped, "--max-steps", 6)
    assert "(1×4×4, 2 classes, 128 training and 20 test images)" in done.stdout.splitlines()[0]


@pytest.mark.parametrize("change", ["image", "label", "order", "shape"])
def test_the_fingerprint_changes_with_every_image_and_label(change):
    images = np.random.default_rng(0).integers(0, 256, (1100, 1, 2, 4), dtype=np.uint8)
    labels = np.arange(1100) % 2
    first = ImageData("one", ("a", "b"), images, labels, images, labels).fingerprint()
    images, labels = images.copy(), labels.copy()
    if change == "image":
        images[-1, 0, 1, 3] ^= 1
    elif change == "label":
        labels[1050] ^= 1
    elif change == "order":
        images[:2] = images[1::-1].copy()
    else:
        images = images.reshape(1100, 1, 4, 2)
    assert ImageData("one", ("a", "b"), images, labels, images, labels).fingerprint() != first


def test_the_fingerprint_does_not_depend_on_the_memory_order():
    images, labels = np.arange(4 * 2 * 8 * 8).astype(np.uint8).reshape(4, 2, 8, 8), np.arange(4) % 2
    transposed = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    one, other = (ImageData("one", ("a", "b"), each, labels, each, labels) for each in (images, transposed))
    assert one.fingerprint() == other.fingerprint()


def test_a_checkpoint_describes_its_data_in_plain_types(commands, stopped):
    data = checkpoint(stopped / "run")["data"]
    assert json.loads(json.dumps(data)) == data and not any(map(torch.is_tensor, data.values()))
    assert (data["train_images"], data["test_images"], len(data["fingerprint"])) == (128, 20, 16)


SPLIT = """
import random
import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, random_split
from hvd_adam.data import Datasets

ROWS = TensorDataset(torch.arange(100.0)[:, None], torch.arange(100) % 2)

def seeded():
    order = torch.tensor(np.random.permutation(random.sample(range(100), 100)))
    return Datasets(*random_split(Subset(ROWS, order), [80, 20]), ("even", "odd"))

def unseeded():
    order = np.random.default_rng().permutation(100)
    return Datasets(Subset(ROWS, order[:80]), Subset(ROWS, order[80:]), ("even", "odd"))
"""


def test_a_split_by_the_global_generators_is_the_same_whatever_their_state(tmp_path, monkeypatch):
    (tmp_path / "splits.py").write_text(SPLIT)
    monkeypatch.syspath_prepend(tmp_path)
    numbers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made = load("splits:seeded")
        assert torch.equal(torch.get_rng_state(), before)
        numbers.append([int(row) for part in (made.train, made.test) for row, _ in part])
    assert numbers[0] == numbers[1] and sorted(numbers[0]) == list(range(100))


def test_ranks_with_splits_of_their_own_are_refused(tmp_path):
    (tmp_path / "splits.py").write_text(SPLIT)
    argv = ["--dataset", "splits:unseeded", "--model", "mlp", "--batch-size", "8", "--workers", "0"]
    done = train(*argv, ranks=2, folder=tmp_path / "run", cwd=tmp_path)
    assert done.returncode != 0 and "the ranks have different data: fingerprint" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def fingerprint(train, test):
    return checked(Datasets(train, test, ()), "data set 'mine:data'").fingerprint


def test_samples_of_torch_data_sets_have_a_fingerprint_of_the_split_and_the_order():
    rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(rows, rows[:, 0])
    first = fingerprint(Subset(data, range(50)), Subset(data, range(50, 60)))
    assert len(first) == 16
    same = TensorDataset(rows * (1 + 1e-7), rows[:, 0])  # another order of additions in a normalization
    assert fingerprint(Subset(same, range(50)), Subset(same, range(50, 60))) == first
    assert fingerprint(Subset(data, range(10, 60)), Subset(data, range(10))) != first
    assert fingerprint(Subset(data, range(49, -1, -1)), Subset(data, range(50, 60))) != first
    assert fingerprint(Subset(data, range(50)), Subset(data, range(59, 49, -1))) != first


class Drawn(list):
    """Samples with noise: of the global generators, or of one of their own without a seed."""

    def __init__(self, own):
        super().__init__((np.full(3, float(number)), number) for number in range(9))
        self.draw = np.random.default_rng().standard_normal if own else np.random.standard_normal

    def __getitem__(self, index):
        row, number = super().__getitem__(index)
        return row + self.draw(3), number


class Damaged(list):
    """Samples that cannot be read."""

    def __getitem__(self, index):
        raise UnreadableSample("photo.jpg", "not an image")


def test_samples_with_noise_or_that_cannot_be_read_are_no_other_data():
    rows = list(zip(torch.arange(9.0)[:, None].expand(9, 3), range(9), strict=True))
    assert fingerprint(Drawn(own=False), rows) == fingerprint(Drawn(own=False), rows) != ""
    assert fingerprint(Drawn(own=True), rows) == ""
    assert fingerprint(Damaged(rows), rows) == ""


def test_a_checkpoint_of_torch_data_sets_without_a_fingerprint_is_resumed():
    own = {"classes": [], "mean": [], "train_images": 9, "test_images": 3, "fingerprint": "00"}
    TrainingState({}, {}, None, {}, {}, [], {}, {**own, "fingerprint": ""}).require_same_data(own, "old")
