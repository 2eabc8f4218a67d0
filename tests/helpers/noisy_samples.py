"""Map-style data sets for the tests of worker processes, which import them from here."""

import multiprocessing
import os
import random
import sys
import time

import numpy as np
import torch

from hvd_adam.data import Datasets, UnreadableSample
from hvd_adam.data.worker_loader import WorkerLoader


class NoisySamples:
    """Sample i is labelled i; its input is noise of all three generators. Some raise, or end their process."""

    def __init__(self, count, unreadable=(), failing=(), ending=()):
        self.count, self.unreadable, self.failing, self.ending = count, unreadable, failing, ending

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableSample(f"file{index}", "damaged")
        if index in self.failing:
            raise KeyError(f"no key\nfor {index}")
        if index in self.ending:
            os._exit(3)
        noise = [torch.rand(1).item(), np.random.random(), random.random()]
        return torch.tensor(noise, dtype=torch.float64), index


def noisy(count=48, tests=7, **options):
    return Datasets(NoisySamples(count, **options), NoisySamples(tests, **options), (), "noisy")


def main():
    """Prints the process ids of two workers; reads on after a line of input, then waits to be killed."""
    batches = WorkerLoader(noisy(100), torch.device("cpu"), workers=2).train_batches(0, 0, global_batch_size=1)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.readline()
    print(f"read {1 + len(list(batches))} batches", flush=True)
    time.sleep(200)


if __name__ == "__main__":
    sys.exit(main())
