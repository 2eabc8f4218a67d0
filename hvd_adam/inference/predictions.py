"""`Predictions`: what a model predicts for each test sample, of all ranks, in one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hvd_adam.checkpoint.output import whole_file
from hvd_adam.data.protocols import Loader
from hvd_adam.data.sampling import evaluation_share
from hvd_adam.data.worker_loader import WorkerLoader
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.cluster import Cluster
from hvd_adam.errors import UserError
from hvd_adam.inference.one_by_one import one_by_one


class Predictions:
    """Collects the predictions of this rank's test samples; rank 0 writes those of all ranks, as JSON lines.

    Args:
        path: the file; used on rank 0 only.
        cluster: this process.
        loader: of the test samples.

    Raises:
        UserError: the data has no classes.
    """

    def __init__(self, path: Path, cluster: Cluster, loader: Loader) -> None:
        classes = tuple(loader.data.classes)
        if not classes:
            raise UserError(f"--predictions {path}: the data set has no classes")
        self._path, self._cluster, self._loader, self._classes = path, cluster, loader, classes
        # A rank without samples sends these: they must have the dtypes of the other ranks' parts.
        self._probabilities = [torch.empty(0, len(classes), dtype=loader.dtype)]
        self._targets = [torch.empty(0, dtype=torch.int64)]

    def add(self, outputs: Any, targets: torch.Tensor, dtype: torch.dtype) -> None:
        """Adds a batch.

        Args:
            outputs: of the model.
            targets: as many.
            dtype: of the probabilities; that of the loader.

        Raises:
            UserError: the outputs are not logits of the classes, or the targets not labels.
        """
        expected = (len(targets), len(self._classes))
        if not isinstance(outputs, torch.Tensor) or outputs.shape != expected or not outputs.is_floating_point():
            raise UserError(f"--predictions: the model does not return logits of shape {expected}")
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise UserError(
                f"--predictions: targets are {targets.dtype} of shape {tuple(targets.shape)}, not labels"
            )
        probabilities = one_by_one(lambda rows: rows.to(dtype).softmax(dim=1), outputs, parallel=False)
        self._probabilities.append(probabilities.cpu())
        self._targets.append(targets.cpu())

    def write(self) -> None:
        """Writes the file, after the whole test set; every rank must call it.

        Raises:
            UserError: the file cannot be written; raised on every rank.
        """
        own = {
            "indices": torch.tensor(self._indices(), dtype=torch.int64),
            "targets": torch.cat(self._targets),
            "probabilities": torch.cat(self._probabilities),
        }
        parts = self._cluster.gather(own)
        with raise_on_all_ranks(self._cluster):
            if self._cluster.rank == 0:
                path_of = self._path_of()
                self._save(line for part in parts for line in self._lines(part, path_of))

    def _indices(self) -> list[int]:
        """Returns the indices of the test samples that this rank has read, in their order."""
        count, cluster = self._loader.description()["test_images"], self._cluster
        left_out = self._loader.left_out if isinstance(self._loader, WorkerLoader) else set()
        return [index for index in evaluation_share(count, cluster.rank, cluster.size) if index not in left_out]

    def _path_of(self) -> Callable[[int], str] | None:
        """Returns a function that finds the file of a test sample; None if samples are no files."""
        if not isinstance(self._loader, WorkerLoader) or self._loader.data.name != "imagefolder":
            return None
        from hvd_adam.data.image_folder.files import ImageFiles  # torchvision takes a second to import

        return self._loader.data.test.path if isinstance(self._loader.data.test, ImageFiles) else None

    def _lines(self, part: dict[str, torch.Tensor], path_of: Callable[[int], str] | None) -> Iterator[str]:
        columns = part["indices"].tolist(), part["targets"].tolist(), part["probabilities"]
        for index, target, probabilities in zip(*columns, strict=True):
            line = {"index": index} if path_of is None else {"index": index, "path": path_of(index)}
            is_finite = bool(probabilities.isfinite().all())  # otherwise there is no prediction
            predicted = self._classes[int(probabilities.argmax())] if is_finite else None
            line |= {"target": self._classes[target], "predicted": predicted}
            yield json.dumps({**line, "probabilities": shortest(probabilities) if is_finite else None}) + "\n"

    def _save(self, lines: Iterable[str]) -> None:
        with whole_file("--predictions", self._path) as draft, draft.open("w") as file:
            file.writelines(lines)


def shortest(values: torch.Tensor) -> list[float]:
    """Returns numbers whose JSON is the shortest text from which the same bits are read into the tensor's dtype.

    Args:
        values: floating-point, on the CPU.
    """
    return [float(str(value)) for value in values.numpy()]
