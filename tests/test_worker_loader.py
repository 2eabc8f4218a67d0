"""Batches made by worker processes.

Hazards: order or augmentation that depends on ranks, micro-batches or workers; an epoch that resumes elsewhere
than it stopped; augmentation that disturbs the generator of dropout; a test sample counted twice or never; a
sample that fails, or a worker that is killed, without a message that names it; a sample that is dropped silently;
a signal to the job that ends its workers before the last update; workers that outlive their rank, or keep it from
ending; processes of other code that inherit blocked signals; callbacks that accumulate.
"""

import atexit
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from helpers.noisy_samples import NoisySamples, noisy
from helpers.training_runs import ROOT
from torch.utils.data import IterableDataset

from hvd_adam.data import Datasets
from hvd_adam.data.normalize import Normalization
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.errors import RankError, UserError

CPU = torch.device("cpu")


def loader(datasets=None, workers=0, **options):
    return WorkerLoader(datasets or noisy(), CPU, workers=workers, dtype=torch.float64, **options)


def joined(batches):
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.fixture(scope="module")
def two_workers():
    """A loader with two workers, which the tests share because they take seconds to start."""
    shared = loader(workers=2)
    yield shared
    shared.close()


def epoch(of, **options):
    return list(of.train_batches(3, 2, global_batch_size=12, **options))


def test_workers_ranks_and_micro_batches_do_not_change_the_batches(two_workers):
    expected = epoch(loader())
    assert len(expected) == 4 and len(joined(expected)[1].unique()) == 48
    for accumulate, source in ((1, two_workers), (2, loader())):
        ranks = [epoch(source, rank=rank, size=2, accumulate=accumulate) for rank in range(2)]
        for step, (inputs, targets) in enumerate(expected):
            micro_batches = slice(step * accumulate, (step + 1) * accumulate)
            parts = joined(part for batches in ranks for part in batches[micro_batches])
            assert torch.equal(parts[0], inputs) and torch.equal(parts[1], targets)


def test_an_epoch_resumes_at_any_step_and_the_next_one_is_augmented_differently(two_workers):
    whole, rest = epoch(two_workers), epoch(two_workers, first_step=3)
    assert len(rest) == 1 and torch.equal(rest[0][0], whole[3][0])
    other = joined(two_workers.train_batches(3, 3, global_batch_size=12))[0]
    assert not set(other.flatten().tolist()) & set(joined(whole)[0].flatten().tolist())


def test_every_test_sample_is_read_once_and_equally_in_every_evaluation(two_workers):
    parts = [joined(two_workers.test_batches(2, rank=rank, size=3)) for rank in range(3)]
    inputs, targets = joined(parts)
    assert targets.tolist() == list(range(7))
    assert torch.equal(joined(loader().test_batches(256))[0], inputs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_the_rank_are_left_alone(workers, two_workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    source = two_workers if workers else loader()
    for _ in source.train_batches(0, 0, global_batch_size=24):
        assert torch.equal(torch.get_rng_state(), before[0])
    assert noisy().sample_shape == (3,)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(after[0], before[0]) and after[1:] == before[1:]


def test_an_iterator_is_refused_after_another_one_has_begun(two_workers):
    batches = two_workers.train_batches(0, 0, global_batch_size=4)
    next(batches)
    assert len(list(two_workers.test_batches(4))) == 2
    with pytest.raises(RuntimeError, match="another iteration"):
        next(batches)


def test_an_unreadable_sample_is_replaced_in_training_and_left_out_of_the_evaluation(caplog):
    source = loader(noisy(unreadable=(3, 4, 6)), unreadable=UnreadableSamples(3))
    _, targets = joined(source.train_batches(0, 0, global_batch_size=48))
    assert sorted(targets.tolist()) == sorted([*range(3), 5, 5, 5, 7, *range(7, 48)])
    _, tested = joined(source.test_batches(2, rank=0, size=1))
    assert tested.tolist() == [0, 1, 2, 5]
    assert len([line for line in caplog.messages if "file3 (damaged)" in line]) == 1


@pytest.mark.parametrize("batches", ["train_batches", "test_batches"])
def test_more_unreadable_samples_than_the_limit_end_the_run(batches):
    source = loader(noisy(unreadable=(1, 3)), unreadable=UnreadableSamples(1))
    arguments = {"seed": 0, "epoch": 0, "global_batch_size": 48} if "train" in batches else {"batch_size": 48}
    with pytest.raises(UserError, match=r"cannot read file\d.*--max-corrupt 2"):
        list(getattr(source, batches)(**arguments))


def test_training_samples_that_are_all_unreadable_end_the_run_within_the_limit():
    source = loader(
        Datasets(NoisySamples(3, unreadable=range(3)), NoisySamples(1), ()), unreadable=UnreadableSamples(9)
    )
    with pytest.raises(UserError, match="no training sample can be read"):
        next(source.train_batches(0, 0, global_batch_size=2))


class ByShape(NoisySamples):
    def __getitem__(self, index):
        return torch.zeros(1 + index % 2), index


class Leaving(NoisySamples):
    def __getitem__(self, index):
        sys.exit(3)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (noisy(failing=(5,)), r"training sample 5 cannot be read: KeyError: .*no key.*\(noisy_samples.py:\d+\)"),
        (Datasets(Leaving(4), Leaving(4), ()), r"training sample \d cannot be read: SystemExit: 3 \(test_worker"),
        (Datasets(ByShape(4), ByShape(4), ()), r"Tensor of shape \(1,\), int\) and \(Tensor of shape \(2,\)"),
        (Datasets(["abc", "def"] * 4, ["x"], ()), r"do not form a batch: they are str"),
    ],
)
def test_a_sample_that_fails_is_named(datasets, message):
    with pytest.raises(UserError, match=message) as caught:
        list(loader(datasets).train_batches(0, 0, global_batch_size=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_none_is_named_and_is_no_unreadable_file(workers):
    samples = [(torch.zeros(1), 0), None, (torch.zeros(1), 0), None]
    source = loader(Datasets(samples, samples, (), "own"), workers, unreadable=UnreadableSamples(9))
    with pytest.raises(UserError, match=r"data set own: training sample [13] is None: return \(input, target\)"):
        list(source.train_batches(0, 0, global_batch_size=2))
    with pytest.raises(UserError) as caught:
        list(source.test_batches(2))
    assert "test sample 1 is None" in str(caught.value) and "\n" not in str(caught.value)
    source.close()


class GivenStream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        return iter(self.samples)


def test_a_sample_of_a_stream_that_is_none_is_named_on_every_rank():
    samples = GivenStream([(torch.zeros(1), 0), None, (torch.zeros(1), 0), (torch.zeros(1), 0)])
    source = loader(Datasets(samples, samples, (), "own"))
    for rank in range(2):
        with pytest.raises(UserError, match=r"set own: train: sample 1 is None: yield \(input, target\) only"):
            list(source.train_batches(0, 0, global_batch_size=2, rank=rank, size=2))
    with pytest.raises(UserError, match="set own: test: sample 1 is None"):
        list(source.test_batches(4))


def test_passes_over_a_stream_leave_no_callbacks_behind():
    samples = GivenStream([(torch.zeros(1), 0)] * 2)
    source = loader(Datasets(samples, samples, ()))
    list(source.test_batches(2))
    before = atexit._ncallbacks()
    for number in range(3):
        list(source.train_batches(0, number, global_batch_size=2))
    assert atexit._ncallbacks() == before


def test_bytes_without_statistics_get_the_dtype_and_keep_their_values():
    samples = [(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([7], dtype=torch.uint8))]
    ((inputs, targets),) = loader(Datasets(samples, samples, ())).test_batches(1)
    assert inputs.dtype == torch.float64 and inputs.tolist() == [[0, 255]]
    assert targets.dtype == torch.uint8


def labelled(labels, classes=("a", "b")):
    samples = [(torch.zeros(1), label) for label in labels]
    return Datasets(samples, samples, classes, name="own")


@pytest.mark.parametrize("label", [2, -1, torch.tensor(-100), np.int64(7), torch.tensor(2, dtype=torch.uint8)])
def test_a_label_outside_the_classes_is_named(label):
    made = labelled([0, torch.tensor(1), label, np.int8(0)])
    for batches, part in (
        (lambda reader: reader.train_batches(0, 0, global_batch_size=4), "training"),
        (lambda reader: reader.test_batches(4), "test"),
    ):
        with pytest.raises(UserError) as caught:
            list(batches(loader(made)))
        assert str(caught.value) == (
            f"data set own: {part} sample 2 has label {int(label)}, but with 2 classes labels must lie in 0 to 1"
        )


def test_targets_that_are_no_labels_of_classes_are_not_checked():
    sizes = {"global_batch_size": 2}
    assert len(list(loader(labelled([5, -1], ())).train_batches(0, 0, **sizes))) == 1
    assert len(list(loader(labelled([0.5, -1.0])).train_batches(0, 0, **sizes))) == 1
    assert len(list(loader(labelled([torch.tensor([5]), torch.tensor([7])])).train_batches(0, 0, **sizes))) == 1
    unlabelled = WorkerLoader(labelled([1, -1]), torch.device("cpu"), checks_training_labels=False)
    assert len(list(unlabelled.train_batches(0, 0, **sizes))) == 1
    with pytest.raises(UserError, match="test sample 1 has label -1"):
        list(unlabelled.test_batches(2))


def test_a_part_without_samples_is_refused():
    with pytest.raises(UserError, match="no test samples"):
        noisy(tests=0)


@pytest.mark.slow
def test_a_worker_that_ends_is_reported_and_so_is_what_cannot_be_sent_to_one():
    with pytest.raises(RankError, match=r"rank 0 on .*worker .* exited unexpectedly.*--workers"):
        list(loader(noisy(ending=(5,)), workers=1).train_batches(0, 0, global_batch_size=48))
    unsendable = noisy(failing=lambda: None)
    with pytest.raises(UserError, match=r"noisy cannot be sent to worker processes.*--workers 0"):
        list(loader(unsendable, workers=1).train_batches(0, 0, global_batch_size=48))


def test_a_worker_that_is_killed_before_its_batch_is_read_is_reported():
    source = loader(workers=1)
    others = set(multiprocessing.active_children())
    batches = source.train_batches(0, 0, global_batch_size=4)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    time.sleep(0.3)  # the next batches are on their way, most likely; the error is the same without
    worker.kill()
    worker.join()
    with pytest.raises(RankError, match=r"rank 0 on .*worker.*--workers"):
        list(batches)


@pytest.mark.slow
def test_workers_ignore_the_signals_of_a_job_and_end_when_their_rank_is_killed():
    command = [sys.executable, "-m", "helpers.noisy_samples"]
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True) as rank:
        workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        family = psutil.Process(rank.pid).children(recursive=True)
        assert len(workers) == 2 and set(workers) <= set(family)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for process in family:
                process.send_signal(number)
        rank.stdin.write("continue\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "read 100 batches\n"
        rank.kill()
        assert not psutil.wait_procs(family, timeout=250)[1]


HOLDS_AN_ITERATOR = """
import torch
from helpers.noisy_samples import noisy
from hvd_adam.data.worker_loader import WorkerLoader
batches = WorkerLoader(noisy(), torch.device("cpu"), workers=1).train_batches(0, 0, global_batch_size=4)
next(batches)
raise ValueError("in the loop")
"""


def test_a_rank_that_holds_an_iterator_ends():
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", HOLDS_AN_ITERATOR]
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=250)  # or hangs for ever
    assert done.returncode == 1 and done.stderr.endswith("ValueError: in the loop\n"), done.stderr


def test_signals_end_the_processes_of_other_code():
    loader(workers=1)  # starts its server
    other = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(250,), daemon=True)
    other.start()
    other.terminate()
    other.join(20)
    ended_with = other.exitcode
    other.kill()
    assert ended_with == -signal.SIGTERM


def test_closing_ends_the_workers():
    source = loader(workers=1)
    next(source.train_batches(0, 0, global_batch_size=4))
    started = set(multiprocessing.active_children())
    source.close()
    assert started - set(multiprocessing.active_children())


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", [20, 320])  # in the heap, and in pages of their own
def test_normalized_images_are_those_of_the_formula_bit_for_bit(side, dtype, form):
    images = torch.arange(2 * 3 * side**2).remainder(256).to(torch.uint8).view(2, 3, side, side)
    mean, std = (0.4, 0.5, 0.6), (0.21, 0.3, 0.2)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    shift, divisor = (
        (torch.tensor(part, dtype=torch.float64) * 255).to(working).view(3, 1, 1) for part in (mean, std)
    )
    normalize = Normalization(mean, std, CPU, dtype, form)
    expected = ((images.to(working) - shift) / divisor).to(dtype)
    for source in (images, images.contiguous(memory_format=torch.channels_last)):
        normalized = normalize(source)
        assert normalized.dtype == dtype and normalized.is_contiguous(memory_format=form)
        assert torch.equal(normalized, expected)


def test_memory_of_a_batch_is_used_again_only_if_nothing_holds_it():
    normalize = Normalization((0.5,), (0.5,), CPU, torch.float32, torch.contiguous_format)
    images = [torch.full((2, 1, 512, 512), value, dtype=torch.uint8) for value in (0, 255, 51)]
    first = normalize(images[0])
    part = first[1, 0, 7]  # a view
    second = normalize(images[1])
    assert (first == -1).all() and (second == 1).all()
    place = second.data_ptr()
    del first, second
    assert normalize(images[2]).data_ptr() == place and (part == -1).all()
    weight = torch.ones((), requires_grad=True)
    product = (normalize(images[1]) * weight).sum()  # whose graph holds the batch
    assert normalize(images[0]).data_ptr() != place
    product.backward()
    assert weight.grad == images[1].numel()
