"""`WorkerLoader`: makes batches from PyTorch data sets, in worker processes."""

from __future__ import annotations

import atexit
import pickle
import socket
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hvd_adam.data import sampling
from hvd_adam.data.datasets import Datasets, is_stream
from hvd_adam.data.normalize import Normalization
from hvd_adam.data.protocols import Batch
from hvd_adam.data.workers import processes
from hvd_adam.data.workers.random_state import preserved
from hvd_adam.data.workers.samples import Answer, Collate, Request, RequestedSamples
from hvd_adam.data.workers.stream import Stream
from hvd_adam.data.workers.unreadable import UnreadableSamples
from hvd_adam.errors import RankError, UserError

_open_loaders: weakref.WeakSet[WorkerLoader] = weakref.WeakSet()


class WorkerLoader:
    """Training and test batches of PyTorch data sets, on a device.

    Each rank reads the samples of its own share only; of an iterable data set it reads all samples, in one worker,
    and keeps those of its share. The random numbers of a sample depend on the seed, the epoch and its place in the
    epoch: at any number of ranks and workers the batches are the same bit for bit.

    Inputs of dtype uint8 are normalized on the device if the data sets have statistics; otherwise they keep their
    values, 0 to 255. Inputs of dtype uint8 or floating-point get the loader's dtype, and so do floating-point
    targets; all other inputs and targets keep theirs.

    Args:
        datasets: the samples.
        device: where batches are used.
        workers: worker processes of this rank, which start with the first batch; 0: the rank itself reads.
        dtype: of floating-point inputs and targets.
        channels_last: whether inputs with four dimensions have channels-last memory format.
        unreadable: tolerates a number of samples that raise `UnreadableSample`; None: the first one ends the run.
        checks_training_labels: whether integers as targets of training samples must be labels of the classes, if
            there are any; those of test samples must.

    Attributes:
        left_out: indices of the test samples that this rank could not read.
    """

    def __init__(
        self,
        datasets: Datasets,
        device: torch.device,
        *,
        workers: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        unreadable: UnreadableSamples | None = None,
        checks_training_labels: bool = True,
    ) -> None:
        self.data = datasets
        self.device = torch.device(device)
        self.dtype = dtype
        self.workers = workers
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._normalize: Normalization | None = None
        if datasets.mean is not None and datasets.std is not None:
            self._normalize = Normalization(datasets.mean, datasets.std, self.device, dtype, self._memory_format)
        self._unreadable, self._checks_training_labels = unreadable or UnreadableSamples(0), checks_training_labels
        self.left_out: set[int] = set()
        self._plan = _Plan()
        self._loader: DataLoader[Answer] | None = None
        if workers:
            # In the background, while the rank builds its model.
            processes.start_server(__name__, type(datasets.train).__module__, *datasets.preload)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """As `protocols.Loader`."""
        mean, std = self.data.mean, self.data.std
        return None if mean is None or std is None else (mean, std)

    def description(self) -> dict[str, Any]:
        """Returns what a checkpoint records of the data: see `checkpoint.state.TrainingState`."""
        data = self.data
        return {
            "classes": list(data.classes),
            "mean": list(data.mean or ()),
            "std": list(data.std or ()),
            "shape": list(data.sample_shape),
            "resize": None if data.resize is None else list(data.resize),
            "train_images": len(data.train),
            "test_images": len(data.test),
            "fingerprint": data.fingerprint,
        }

    def steps_per_epoch(self, global_batch_size: int) -> int:
        """As `protocols.Loader`."""
        return sampling.steps_per_epoch(len(self.data.train), global_batch_size)

    def train_batches(
        self,
        seed: int,
        epoch: int,
        *,
        global_batch_size: int,
        rank: int = 0,
        size: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> Iterator[Batch]:
        """As `protocols.Loader`. An iterator ends where another one of this loader begins.

        Of an iterable data set the updates before `first_step` are read and dropped.

        Raises:
            UserError: also: a sample cannot be read, or samples do not form a batch.
            RankError: a worker process has ended.
        """
        steps = range(first_step, self.steps_per_epoch(global_batch_size))
        if is_stream(self.data.train):
            shares = [
                sampling.share(global_batch_size, rank=rank, size=size, micro_batch=part, accumulate=accumulate)
                for part in range(accumulate)
            ]
            starts = ((step * global_batch_size, share) for step in steps for share in shares)
            ranges = [range(start + share.start, start + share.stop) for start, share in starts]
            words = partial(sampling.augmentation_bits, seed, epoch, global_batch_size=global_batch_size)
            stream = self._stream("train", ranges, epoch, words, global_batch_size, to_end=rank == size - 1)
            return self._batches(stream, rank)

        def requests() -> Iterator[list[Request]]:
            order = sampling.epoch_order(len(self.data.train), seed, epoch)
            for step in steps:
                words = sampling.augmentation_bits(seed, epoch, step, global_batch_size)
                for micro_batch in range(accumulate):
                    part = {"rank": rank, "size": size, "micro_batch": micro_batch, "accumulate": accumulate}
                    indices = sampling.batch_share(order, step, global_batch_size=global_batch_size, **part)
                    mine = words[sampling.share(global_batch_size, **part)]
                    yield [Request(int(index), int(word), True) for index, word in zip(indices, mine, strict=True)]

        return self._batches(requests(), rank)

    def test_batches(self, batch_size: int, *, rank: int = 0, size: int = 1) -> Iterator[Batch]:
        """As `protocols.Loader`; the samples are in order, without those that cannot be read.

        Raises:
            UserError: as `train_batches`.
            RankError: as `train_batches`.
        """
        words = sampling.evaluation_bits(len(self.data.test))
        mine = sampling.evaluation_share(len(words), rank, size)
        starts = range(mine.start, mine.stop, batch_size)
        ranges = [range(start, min(start + batch_size, mine.stop)) for start in starts]
        if is_stream(self.data.test):
            every = partial(_same_for_every_group, words)
            stream = self._stream("test", ranges, 0, every, len(words), to_end=rank == size - 1)
            return self._batches(stream, rank)
        return self._batches(([Request(i, int(words[i]), False) for i in indices] for indices in ranges), rank)

    def close(self) -> None:
        """Ends the worker processes; the next batch would start new ones."""
        self._loader = None  # torch's iterator ends them when it is deleted
        _open_loaders.discard(self)

    def _stream(
        self,
        part: str,
        ranges: list[range],
        epoch: int,
        words: Callable[[int], np.ndarray],
        group: int,
        *,
        to_end: bool,  # the last rank does, which has the least to read on
    ) -> Stream:
        name = f"data set {self.data.name}: {part}"
        classes = len(self.data.classes) if part == "test" or self._checks_training_labels else 0
        return Stream(getattr(self.data, part), name, ranges, epoch, words, group, classes, to_end)

    def _batches(self, requests: Iterable[list[Request]] | Stream, rank: int) -> Iterator[Batch]:
        batches = self._fetched(requests, rank)
        return self._copied_ahead(batches) if self.device.type == "cuda" else map(self._converted, batches)

    def _fetched(self, requests: Iterable[list[Request]] | Stream, rank: int) -> Iterator[Batch]:
        """Yields batches on the host."""
        answers = self._start(requests)
        own_process = self.workers == 0
        while True:
            if self._plan.requests is not requests:
                raise RuntimeError("another iteration over this WorkerLoader has begun: finish one first")
            try:
                with preserved() if own_process else nullcontext():  # dropout draws from the same generators
                    answer = next(answers, None)
            except (RuntimeError, OSError, EOFError) as error:
                # The error is torch's: what a sample raises arrives as a failure. Tensors are in memory that the
                # worker hands over when they are read: it must be alive then.
                reason = str(error).partition("\n")[0].strip().rstrip(".")
                if not isinstance(error, RuntimeError):
                    reason = f"a worker process has ended before its batch was read ({type(error).__name__})"
                raise RankError(
                    f"rank {rank} on {socket.gethostname()}: {reason}: if memory or /dev/shm is full, use fewer "
                    "--workers"
                ) from error
            if answer is None:
                return
            self._unreadable.add(answer.unreadable)
            self.left_out.update(answer.left_out)
            if answer.failure:
                raise UserError(answer.failure)
            if answer.value is not None:
                yield answer.value

    def _start(self, requests: Iterable[list[Request]] | Stream) -> Iterator[Answer]:
        if isinstance(requests, Stream):  # each pass has a worker of its own
            self._loader = self._make_loader(requests, min(self.workers, 1), batch_size=None, collate_fn=_as_it_is)
        elif self._loader is None or isinstance(self._loader.dataset, Stream):
            samples = RequestedSamples(self.data, self._checks_training_labels, self._unreadable.limit)
            plan = {"batch_sampler": self._plan, "collate_fn": Collate(self.data.name)}
            self._loader = self._make_loader(samples, self.workers, **plan, persistent_workers=self.workers > 0)
        self._plan.requests = requests
        try:
            with processes.starting() if self.workers else nullcontext(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Got pickle error")  # the error below says it
                return iter(self._loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            self._loader = None
            raise UserError(
                f"data set {self.data.name} cannot be sent to worker processes ({error}): define its functions "
                "and classes at the top of a module, or use --workers 0"
            ) from error

    def _make_loader(self, samples: Dataset[Answer], workers: int, **options: Any) -> DataLoader[Answer]:
        _open_loaders.add(self)
        return DataLoader(
            samples,
            num_workers=workers,
            multiprocessing_context=processes.context if workers else None,
            worker_init_fn=processes.end_with_rank,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # it would otherwise draw from the one of dropout, in every epoch
            **options,
        )

    def _converted(self, batch: Batch) -> Batch:
        """Returns a batch, on the device, with the loader's dtype."""
        inputs, targets = batch
        if inputs.dtype == torch.uint8 and self._normalize is not None:
            inputs = self._normalize(inputs)
        else:
            form = self._memory_format if inputs.dim() == 4 else torch.contiguous_format
            floating = inputs.is_floating_point() or inputs.dtype == torch.uint8
            inputs = inputs.to(self.dtype if floating else inputs.dtype, memory_format=form)
        return inputs, targets.to(self.dtype) if targets.is_floating_point() else targets

    def _copied_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Copies each batch to the GPU while the one before is in use."""
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # PyTorch's
        waiting: tuple[list[torch.Tensor], torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(stream):
                copies = [tensor.to(self.device, non_blocking=True) for tensor in batch]
                copied = stream.record_event()
            if waiting is not None:
                yield self._received(*waiting)
            waiting = copies, copied
        if waiting is not None:
            yield self._received(*waiting)

    def _received(self, copies: list[torch.Tensor], copied: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in copies:
            tensor.record_stream(current)  # its memory belongs to the stream of the copy
        inputs, targets = copies
        return self._converted((inputs, targets))


class _Plan:
    """The batches of an iteration, which `DataLoader` takes for its sampler.

    Attributes:
        requests: those of the current iteration.
    """

    def __init__(self) -> None:
        self.requests: Iterable[Any] = ()

    def __iter__(self) -> Iterator[list[Request]]:
        return iter(self.requests)


def _as_it_is(answer: Answer) -> Answer:
    return answer


def _same_for_every_group(words: np.ndarray, group: int) -> np.ndarray:
    return words


# One callback for all: Python keeps a place for each one that was ever registered.
@atexit.register
def _close_all() -> None:
    """Ends the workers before multiprocessing, whose callback is older and so runs later, kills them."""
    for loader in list(_open_loaders):
        loader.close()
