"""Writes small sets of images in CIFAR-10's file format, for tests of whatever reads them."""

import pickle
from pathlib import Path

import numpy as np

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def write_cifar10(
    data_dir: Path, *, samples_per_batch: int = 40, batches: int = 5, test_samples: int = 40, seed: int = 0
) -> Path:
    """Write ``data_dir/cifar-10-batches-py`` and return that folder.

    Each class has a fixed pattern under noise, so that a model can learn it. Labels are balanced.
    """
    folder = data_dir / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 128, (len(CLASSES), 3072))
    sizes = {f"data_batch_{number}": samples_per_batch for number in range(1, batches + 1)}
    for name, samples in {**sizes, "test_batch": test_samples}.items():
        labels = rng.permutation(np.arange(samples) % len(CLASSES))
        images = patterns[labels] + rng.integers(0, 128, (samples, 3072))
        write_pickle(folder / name, batch(images.astype(np.uint8), labels.tolist(), name))
    write_pickle(
        folder / "batches.meta",
        {
            b"num_cases_per_batch": samples_per_batch,
            b"label_names": [c.encode() for c in CLASSES],
            b"num_vis": 3072,
        },
    )
    return folder


def batch(images: np.ndarray, labels: list[int], name: str) -> dict[bytes, object]:
    """Return the content of one batch file."""
    return {
        b"batch_label": name.encode(),
        b"labels": labels,
        b"data": images,
        b"filenames": [f"{name}_{index}.png".encode() for index in range(len(labels))],
    }


def write_pickle(path: Path, content: object, protocol: int = 2) -> None:
    """Pickle ``content`` into ``path``; protocol 2 is the official files'."""
    path.write_bytes(pickle.dumps(content, protocol))
