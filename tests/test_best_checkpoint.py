"""`checkpoints/best` names the best checkpoint that exists, whatever interrupts its writing.

Hazards: a kill between the checkpoint and `best`, after which the best one is removed as an old one; a best
checkpoint that could not be written, but is still compared with; ranks that disagree on which is the best.
"""

import os
import signal

import pytest
from helpers.training_runs import checkpoint, events, succeeded, train

from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.state import Progress
from hvd_adam.distributed.context import Cluster
from hvd_adam.training.best import BestCheckpoint

# The accuracies are fixed, by update. FAULT is "kill:NAME:N" or "full:NAME:N": what the N-th call does that makes
# or replaces a path with the name.
MODEL = """
import errno, os, signal
from pathlib import Path
import torch
from hvd_adam.checkpoint.state import Progress

ACCURACIES = {3: 0.5, 6: 0.9, 9: 0.7, 12: 0.6}
real = Progress.is_best
Progress.is_best = lambda self, accuracy, loss: real(self, ACCURACIES[self.step], loss)
fault, name, number = os.environ.get("FAULT", "none:none:0").split(":")
calls = []

def faulty(real):
    def call(self, *args, **options):
        if name in self.name:
            calls.append(self)
            if len(calls) == int(number):
                if fault == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **options)
    return call

Path.replace, Path.mkdir = faulty(Path.replace), faulty(Path.mkdir)

class Model(torch.nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1))

def build(in_channels, num_classes, image_size):
    return Model(in_channels * image_size[0] * image_size[1], num_classes)
"""
OPTIONS = (
    "--dataset synthetic --synthetic-shape 1x4x4 --synthetic-samples 96 --model mine:build --global-batch-size 32 "
    "--epochs 4 --keep 1"
).split()


def start(folder, *argv, fault="none:none:0", ranks=0):
    (folder / "mine.py").write_text(MODEL)
    environ = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", "FAULT": fault}
    environ = environ if ranks else os.environ | environ
    return train(*OPTIONS, *argv, folder=folder / "run", ranks=ranks, env=environ)


def best(folder):
    """Returns the name in `best`; its checkpoint must exist."""
    found = storage.resolve(folder / "run", "best")
    assert storage.load(found)["progress"]["step"] == storage.step_of(found)
    return found.name


def test_a_checkpoint_that_a_killed_process_has_not_marked_is_marked_and_kept(tmp_path):
    assert start(tmp_path, fault="kill:.best.new:2").returncode == -signal.SIGKILL
    assert best(tmp_path) == "step-00000003"
    assert checkpoint(tmp_path / "run")["progress"]["step"] == 6
    succeeded(start(tmp_path))
    assert best(tmp_path) == "step-00000006"
    assert checkpoint(tmp_path / "run")["progress"]["best_step"] == 6


# With --checkpoint-every, all ranks must agree on the best one: only that is written.
@pytest.mark.parametrize(
    ("ranks", "argv", "fault"),
    [
        (0, [], "full:.step-00000006.:1"),
        (0, [], "full:.best.new:2"),
        (2, ["--checkpoint-every", "100"], "full:.step-00000006.:1"),
    ],
)
def test_a_best_checkpoint_that_cannot_be_written_does_not_count(ranks, argv, fault, tmp_path):
    succeeded(start(tmp_path, *argv, fault=fault, ranks=ranks))
    assert len(events(tmp_path / "run", "checkpoint_failed")) == 1
    assert best(tmp_path) == "step-00000009"
    progress = checkpoint(tmp_path / "run")["progress"]
    assert (progress["best_accuracy"], progress["best_step"]) == (0.7, 9)


def test_a_checkpoint_that_is_marked_counts_though_older_ones_cannot_be_removed(tmp_path):
    progress = Progress(step=1)
    one = BestCheckpoint(Cluster(0, 1, 0, 1, 0, 1, None, "none"), tmp_path, progress)
    assert one.is_best(0.5, 1.0)
    storage.mark_best(storage.save(tmp_path, 1, {}))
    one.failed()
    assert (progress.best_accuracy, progress.best_step) == (0.5, 1)
    progress.step = 2
    assert not one.is_best(0.4, 1.0)
    one.failed()  # of a checkpoint that is not the best
    assert progress.best_accuracy == 0.5
    assert one.is_best(0.6, 1.0)
    one.failed()
    assert (progress.best_accuracy, progress.best_step) == (0.5, 1)
