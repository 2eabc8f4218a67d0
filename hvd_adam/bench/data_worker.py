"""A rank of `bench data`: reads batches of images in one of several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import psutil
import torch

from hvd_adam.bench.interleave import Measure
from hvd_adam.data.image_folder.files import MEAN, STD
from hvd_adam.data.image_folder.load import load, load_packed
from hvd_adam.data.loader import DeviceLoader
from hvd_adam.data.protocols import Batch, Loader
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.distributed.launch_env import LaunchInfo
from hvd_adam.models.torchvision_compat import import_torchvision


def prepare(task: dict[str, Any], launch: LaunchInfo, folder: Path) -> Measure:
    """Returns a function that reads "batches" batches.

    Args:
        task: "variant" ("torch", "files" or "cache"), "folder" of the images, "cache", "image_size", "workers",
            "batch_size" and "batches".
        launch: unused: there is one rank.
        folder: unused.
    """
    torch.set_num_threads(1)  # as `init` does where ranks share the cores
    epochs = _torch_epochs(task) if task["variant"] == "torch" else _own_epochs(task)
    batches = chain.from_iterable(epochs)

    def measure() -> dict[str, list[float]]:
        start, total = time.perf_counter(), 0
        for images, _ in islice(batches, task["batches"]):
            total += len(images)
        seconds = time.perf_counter() - start
        assert total == task["batches"] * task["batch_size"]
        return {"seconds": [seconds], "megabytes": [psutil.Process().memory_info().rss / 1e6]}

    return measure


def _own_epochs(task: dict[str, Any]) -> Iterator[Iterator[Batch]]:
    folder, size, device = Path(task["folder"]), task["image_size"], torch.device("cpu")
    loader: Loader
    if task["variant"] == "files":
        loader = WorkerLoader(load(folder, image_size=size), device, workers=task["workers"])
    else:
        packed = load_packed(folder, Path(task["cache"]), image_size=size, workers=task["workers"])
        loader = DeviceLoader(packed, device)
    for epoch in count():
        yield loader.train_batches(0, epoch, global_batch_size=task["batch_size"])


def _torch_epochs(task: dict[str, Any]) -> Iterator[Iterator[Batch]]:
    """Reads the files as scripts do: `ImageFolder`, `transforms.v2`, `DataLoader`."""
    import_torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps: list[Callable[[Any], Any]] = [
        v2.RandomResizedCrop(task["image_size"]),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    samples = ImageFolder(str(Path(task["folder"], "train")), v2.Compose(steps))
    loader = torch.utils.data.DataLoader(
        samples,
        batch_size=task["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=task["workers"],
        persistent_workers=task["workers"] > 0,
    )
    while True:
        yield iter(loader)
