"""Iterable data sets in `train`: every rank reads the stream, and all ranks together have its samples once.

Hazards: a sample that two ranks have or none; random numbers that depend on the rank, the worker or a resume; a
stream that ends early or late; a stream that each rank has divided itself; options that a stream cannot follow.
"""

import hashlib
import random

import pytest
import torch
from helpers.training_runs import events, one_line, succeeded, train
from torch.utils.data import IterableDataset

from hvd_adam.checkpoint import storage
from hvd_adam.data import Datasets
from hvd_adam.data.own import checked
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.errors import UserError

CPU, COUNT = torch.device("cpu"), 50

MINE = '''
import os, random
import torch
from torch.utils.data import IterableDataset
from hvd_adam.data import Datasets


class Rows(IterableDataset):
    """Rows through a shuffle buffer, with noise, from the global generators; the order depends on the epoch."""

    def __init__(self, count, shift=0.0):
        self.count, self.shift, self.epoch = count, shift, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        buffer = []
        rows = torch.randn(self.count, 4, generator=torch.Generator().manual_seed(self.epoch))
        for row in rows:
            buffer.append(row)
            if len(buffer) > 8:
                yield self.sample(buffer.pop(random.randrange(len(buffer))))
        yield from map(self.sample, buffer)

    def sample(self, row):
        return row + self.shift + 0.01 * torch.randn(4), int(row.sum() > 0)


def data(count=128, shift=0.0):
    own = shift * int(os.environ.get("HOROVOD_RANK", 0))
    return Datasets(Rows(count, own), Rows(40), ("low", "high"), name="rows")
'''


class Numbers(IterableDataset):
    """Its own place in the stream, the epoch, and a random number, after a shuffle of pairs."""

    def __init__(self, length=COUNT, count=COUNT):
        self.length, self.count, self.epoch = length, count, -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.length

    def __iter__(self):
        for start in range(0, self.count, 2):
            pair = [start, start + 1]
            random.shuffle(pair)
            for number in pair:
                yield torch.tensor([number, self.epoch, torch.rand(())]), number


def batches(workers=0, ranks=1, accumulate=1, first_step=0, **options):
    """Returns the rows of each global batch of 12 in epoch 3, in order, from the shares of all ranks."""
    parts = []
    for rank in range(ranks):
        loader = WorkerLoader(Datasets(Numbers(**options), Numbers(), ()), CPU, workers=workers)
        sizes = {"global_batch_size": 12, "rank": rank, "size": ranks, "accumulate": accumulate}
        share = [rows for rows, _ in loader.train_batches(7, 3, **sizes, first_step=first_step)]
        parts.append([torch.cat(share[i : i + accumulate]) for i in range(0, len(share), accumulate)])
        loader.close()
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def test_batches_are_the_same_at_any_number_of_ranks_micro_batches_and_workers():
    expected = batches()
    assert len(expected) == 4
    assert sorted(torch.cat(expected)[:, 0].tolist()) == list(range(48))
    assert torch.cat(expected)[:, 0].tolist() != list(range(48))  # it was shuffled
    assert {*torch.cat(expected)[:, 1].tolist()} == {3.0}
    for options in ({"ranks": 2}, {"ranks": 3, "accumulate": 2}, {"workers": 1}, {"workers": 3, "ranks": 2}):
        found = batches(**options)
        assert all(map(torch.equal, found, expected)), options


def test_a_resume_reads_the_rest_of_the_epoch():
    assert all(map(torch.equal, batches(ranks=2, first_step=3), batches()[3:]))


def test_test_samples_are_read_once_at_any_number_of_ranks():
    loader = WorkerLoader(Datasets(Numbers(), Numbers(), ()), CPU)
    found = [
        number
        for rank in range(3)
        for _, numbers in loader.test_batches(8, rank=rank, size=3)
        for number in numbers.tolist()
    ]
    assert sorted(found) == list(range(COUNT))


class RowsOf(IterableDataset):
    """Rows of a dtype."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __len__(self):
        return COUNT

    def __iter__(self):
        for number in range(COUNT):
            yield torch.full((2, 3), number, dtype=self.dtype), number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
def test_streams_of_any_dtype_are_accepted(dtype):
    datasets = checked(Datasets(RowsOf(dtype), RowsOf(dtype), ()), "data set 'mine:data'")
    content = bytes(6 * dtype.itemsize) + bytes(8)  # the first row, and its number as int64
    assert datasets.fingerprint == hashlib.sha256(content).hexdigest()[:16]
    rows, numbers = next(WorkerLoader(datasets, CPU).train_batches(0, 0, global_batch_size=COUNT))
    assert torch.equal(rows[:, 0, 0], numbers.float())


def test_a_read_of_the_stream_leaves_the_generators_of_the_rank_alone():
    before = torch.get_rng_state(), random.getstate()
    batches()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_is_shorter_than_its_length_is_refused(workers):
    with pytest.raises(UserError, match="train has ended after 20 of the 50 samples of its __len__"):
        batches(workers, count=20)


@pytest.mark.parametrize(("workers", "length"), [(0, 48), (1, 48), (0, 49), (0, 40)])  # updates have 12 samples
def test_a_stream_that_is_longer_than_its_length_is_refused_by_the_last_rank(workers, length):
    with pytest.raises(UserError, match=f"train yields more than the {length} samples of its __len__: let it"):
        batches(workers, ranks=2, length=length)
    test = Datasets(Numbers(), Numbers(length), ())
    loaders = [WorkerLoader(test, CPU, workers=workers).test_batches(8, rank=rank, size=2) for rank in range(2)]
    assert sum(len(numbers) for _, numbers in loaders[0]) == length // 2
    with pytest.raises(UserError, match=f"test yields more than the {length} samples"):
        list(loaders[1])


def test_a_run_on_a_stream_that_is_longer_than_its_length_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(MINE.replace("return self.count", "return self.count - 8"))
    done = train("--dataset", "mine:data", "--model", "mlp", folder=tmp_path / "run", cwd=tmp_path)
    assert "rows: train yields more than the 120 samples of its __len__: let it return how many" in one_line(done)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of one rank, of one rank that was stopped, and of two ranks with the same global batch."""
    place = tmp_path_factory.mktemp("streams")
    (place / "mine.py").write_text(MINE)
    argv = "--dataset mine:data --model mlp --global-batch-size 16 --lr-scaling none --lr-decay constant".split()
    argv += ["--max-steps", "12", "--log-every", "1", "--epochs", "2"]
    succeeded(train(*argv, folder=place / "one", cwd=place))
    succeeded(train(*argv, "--max-steps", "3", folder=place / "stopped", cwd=place))
    succeeded(train(*argv, "--workers", "0", folder=place / "stopped", cwd=place))
    succeeded(train(*argv, "--workers", "0", ranks=2, folder=place / "two", cwd=place))
    return place


def test_a_run_resumes_in_the_middle_of_an_epoch_bit_for_bit(trained):
    one, other = (storage.load(trained / name)["model"] for name in ("one", "stopped"))
    assert all(map(torch.equal, one.values(), other.values()))


def test_two_ranks_train_as_one_does(trained):
    losses = [[event["loss"] for event in events(trained / name, "step")] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # float32, added in another order, 12 updates of Adam
    scores = [events(trained / name)[-1] for name in ("one", "two")]
    assert scores[0]["test_accuracy"] == scores[1]["test_accuracy"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixup", "0.2"], "--mixup: mine:data returns an iterable training set"),
        (["--workers", "2"], "--workers 2: mine:data returns an iterable training set"),
        (["--max-corrupt", "3"], "--max-corrupt: no effect"),
    ],
)
def test_options_that_a_stream_cannot_follow_are_refused(tmp_path, argv, message):
    (tmp_path / "mine.py").write_text(MINE)
    done = train("--dataset", "mine:data", "--model", "mlp", *argv, folder=tmp_path / "run", cwd=tmp_path)
    assert message in one_line(done)


def test_streams_that_differ_between_ranks_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    argv = ["--dataset", "mine:data", "--model", "mlp", "--data-args", '{"shift": 1.0}', "--workers", "0"]
    done = train(*argv, ranks=2, folder=tmp_path / "run", cwd=tmp_path)
    assert done.returncode != 0 and "the ranks have different data: fingerprint" in done.stderr, done.stderr
