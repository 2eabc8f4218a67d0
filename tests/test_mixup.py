"""`MixupLoader` and `--transforms`: the same mixtures and transforms at any number of ranks.

Hazards: mixtures or transforms that change with the ranks, the micro-batches or a resume; a generator of dropout
that they move; partners that are the samples themselves; labels mixed with other shares than images.
"""

import random

import numpy as np
import pytest
import torch
from helpers.own_code import write

from hvd_adam.data import load
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.mixup import MixupLoader
from hvd_adam.data.transforms import transformed
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.errors import UserError

CPU = torch.device("cpu")


def noisy(image):
    """Draws from all three generators that a transform may use."""
    shift = torch.randint(0, 8, ()) + np.random.randint(8) + random.randrange(8)
    return (image // 2 + shift).to(torch.uint8)


def loaders(kind, tmp_path, monkeypatch):
    """Returns two loaders of the same data, with a transform."""
    if kind == "images":
        data = load("synthetic", synthetic_shape=(1, 4, 4), synthetic_samples=24)
        one = DeviceLoader(data, CPU, transform=noisy)
        return one, one
    write(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    data = load("mine:data", args={"count": 24})
    halved = __import__("mine").halved
    return tuple(WorkerLoader(transformed(data, halved), CPU) for _ in range(2))


def batches(loader, size=1, accumulate=1, first_step=0):
    """Returns inputs and targets of an epoch's global batches of 8, put together from all ranks' parts."""
    steps = []
    parts = [
        list(
            loader.train_batches(
                3, 1, global_batch_size=8, rank=r, size=size, accumulate=accumulate, first_step=first_step
            )
        )
        for r in range(size)
    ]
    for step in range(3 - first_step):
        mine = [part for rank in parts for part in rank[step * accumulate : (step + 1) * accumulate]]
        steps.append(tuple(torch.cat(tensors) for tensors in zip(*mine, strict=True)))
    return steps


@pytest.mark.parametrize("kind", ["images", "samples"])
@pytest.mark.parametrize("alpha", [None, 0.4])
def test_batches_do_not_depend_on_ranks_micro_batches_and_resume(kind, alpha, tmp_path, monkeypatch):
    loader, partners = loaders(kind, tmp_path, monkeypatch)
    mixed = loader if alpha is None else MixupLoader(loader, partners, alpha)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    whole = batches(mixed)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected  # dropout draws from these generators
    for other, start in ((batches(mixed, size=2, accumulate=2), 0), (batches(mixed, first_step=2), 2)):
        for step, parts in zip(whole[start:], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(step, parts, strict=True))


def test_inputs_and_labels_are_mixed_with_the_same_shares():
    # The synthetic images of a class have a mean of their own: here each image is its label.
    data = load("synthetic", synthetic_shape=(1, 1, 1), synthetic_samples=40, synthetic_classes=4)
    data.train_images[:] = data.train_labels[:, None, None, None] * 50
    loader = DeviceLoader(data, CPU, dtype=torch.float64, mean=(0.0,), std=(1.0,))
    images, targets = next(MixupLoader(loader, loader, 1.0).train_batches(0, 0, global_batch_size=40))
    assert targets.shape == (40, 4) and targets.dtype == torch.float64
    torch.testing.assert_close(targets.sum(1), torch.ones(40, dtype=torch.float64))
    means = targets @ (torch.arange(4, dtype=torch.float64) * 50 / 255)
    torch.testing.assert_close(images.flatten(), means)
    assert (targets.max(1).values < 1).sum() > 15  # with partners of another class: three in four


def test_what_cannot_be_mixed_is_refused():
    loader = DeviceLoader(load("digits"), CPU)
    mixup = MixupLoader(loader, loader, 1.0)
    weights = torch.ones(2)
    rows = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(UserError, match="floating-point inputs, not torch"):
        mixup.mix(rows, rows, weights)
    masks = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"targets of shape \(2, 3\) and dtype torch"):
        mixup.mix(masks, masks, weights)
