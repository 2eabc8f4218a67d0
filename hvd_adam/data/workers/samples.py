"""What a worker process of a `WorkerLoader` does: reads samples, joins them, and reports what cannot be read."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from hvd_adam.data.datasets import Datasets, UnreadableSample
from hvd_adam.data.workers.random_state import seed_all


@dataclass(frozen=True)
class Request:
    """A sample that a batch asks for.

    Attributes:
        index: in its part.
        word: seeds what is random in the sample, in [0, 2⁶⁴).
        training: whether it is of the training part.
    """

    index: int
    word: int
    training: bool


class Answer(NamedTuple):
    """What a worker returns for a `Request`, or for all requests of a batch.

    Attributes:
        value: the sample, or the batch `(inputs, targets)`; None if there is none. A sample that is None itself is
            a failure, so that no batch lacks it silently.
        unreadable: messages of the samples that cannot be read.
        failure: why the run must end; empty if it need not.
        left_out: indices of the test samples that cannot be read.
    """

    value: Any = None
    unreadable: tuple[str, ...] = ()
    failure: str = ""
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class RequestedSamples(Dataset[Answer]):
    """Reads the requested samples.

    Attributes:
        datasets: the samples.
        checks_training_labels: whether labels of training samples must be those of classes; test labels must.
        max_unreadable: how many training samples in a row may be unreadable: the first that is readable is taken
            for each of them. What it is depends on the files alone.
    """

    datasets: Datasets
    checks_training_labels: bool
    max_unreadable: int

    def __getitem__(self, request: Request) -> Answer:
        """Reads one sample."""
        samples: Any = self.datasets.train if request.training else self.datasets.test
        unreadable: list[str] = []
        for distance in range(self.max_unreadable + 1 if request.training else 1):
            index = (request.index + distance) % len(samples)
            seed_all(request.word)
            part = "training" if request.training else "test"
            what = f"data set {self.datasets.name}: {part} sample {index}"
            try:
                sample = samples[index]
                if sample is None:
                    advice = "for every index, or raise hvd_adam.data.UnreadableSample for a file that is damaged"
                    return Answer(failure=f"{what} is None: return (input, target) {advice}")
                is_checked = self.checks_training_labels or not request.training
                failure = wrong_label(sample, len(self.datasets.classes), what) if is_checked else ""
                return Answer(sample, tuple(unreadable), failure)
            except UnreadableSample as error:
                unreadable.append(str(error))
            except (Exception, SystemExit) as error:
                # Not caught, sys.exit() would end a worker, or the rank, without a reason.
                return Answer(failure=f"{what} cannot be read: {describe(error)}")
        # Training needs a sample in each place. Fewer samples than the limit may all be unreadable.
        failure = f"data set {self.datasets.name}: no training sample can be read" if request.training else ""
        return Answer(None, tuple(unreadable), failure, () if request.training else (request.index,))


def wrong_label(sample: Any, classes: int, what: str) -> str:
    """Returns what is wrong with the label of a sample; empty if nothing is, or its target is no label.

    On a GPU such a label would end the process in the middle of a kernel, without a reason.

    Args:
        sample: (input, target).
        classes: number of classes; 0 if targets are not classes.
        what: the sample, for the message.
    """
    target = sample[1] if isinstance(sample, tuple | list) and len(sample) == 2 else None
    if isinstance(target, torch.Tensor) and not (target.is_floating_point() or target.is_complex()):
        target = target.item() if target.ndim == 0 else None
    elif isinstance(target, np.ndarray) and target.ndim == 0:
        target = target[()]
    if not classes or not isinstance(target, int | np.integer) or 0 <= target < classes:
        return ""
    return f"{what} has label {target}, but with {classes} classes labels must lie in 0 to {classes - 1}"


@dataclass(frozen=True)
class Collate:
    """Joins the samples of a batch.

    Attributes:
        name: of the data set, for messages.
    """

    name: str

    def __call__(self, answers: Sequence[Answer]) -> Answer:
        """Returns the batch; None as its value if no sample of it can be read."""
        unreadable = tuple(message for answer in answers for message in answer.unreadable)
        failure = next((answer.failure for answer in answers if answer.failure), "")
        left_out = tuple(index for answer in answers for index in answer.left_out)
        samples = [answer.value for answer in answers if answer.value is not None]
        if failure or not samples:
            return Answer(None, unreadable, failure, left_out)
        try:
            inputs, targets = default_collate(samples)
        except Exception as error:
            return Answer(None, unreadable, self._mismatch(samples, error))
        if not (isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
            return Answer(None, unreadable, self._mismatch(samples, TypeError("not tensors")))
        return Answer((inputs, targets), unreadable, left_out=left_out)

    def _mismatch(self, samples: Sequence[Any], error: Exception) -> str:
        kinds = sorted({_describe(sample) for sample in samples})
        reason = "" if len(kinds) > 1 else f" ({str(error).partition(chr(10))[0]})"
        return (
            f"data set {self.name}: its samples do not form a batch: they are {' and '.join(kinds[:2])}{reason}; "
            "return (input, target), with tensors of one shape as inputs and numbers or tensors as targets"
        )


def _describe(sample: Any) -> str:
    """Returns the types and shapes of a sample."""
    if isinstance(sample, tuple | list):
        return f"({', '.join(_describe(part) for part in sample)})"
    shape = getattr(sample, "shape", None)
    return type(sample).__name__ if shape is None else f"{type(sample).__name__} of shape {tuple(shape)}"


def describe(error: BaseException) -> str:
    """Returns an exception and the line that raised it, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''} ({Path(frame.filename).name}:{frame.lineno})"
