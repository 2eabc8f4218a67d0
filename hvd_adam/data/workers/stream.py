"""`Stream`: a rank's share of an `IterableDataset`, which every rank reads from its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from hvd_adam.data.workers.random_state import seed_all
from hvd_adam.data.workers.samples import Answer, Collate, describe, wrong_label


@dataclass(frozen=True)
class Stream(IterableDataset[Answer]):
    """Yields batches of the samples at some places of a stream, and drops the samples between them.

    So all ranks together have the global batches that one rank would have. Before each sample, dropped ones
    included, the global random generators are seeded by its place: where a stream draws from them, to shuffle for
    example, it is the same on every rank.

    Attributes:
        samples: the stream; if it has a method `set_epoch`, that is called first.
        name: of the stream, for messages.
        ranges: the places of each batch, ascending and disjoint.
        epoch: ≥ 0.
        words: returns the seeds, uint64, of the places of a group, by its number.
        group: places in a group.
        classes: number of classes of which labels must be; 0: they are not checked.
        to_end: whether to read on after the last range, to see that the stream ends where its `__len__` says.
    """

    samples: IterableDataset[Any]
    name: str
    ranges: Sequence[range]
    epoch: int
    words: Callable[[int], np.ndarray]
    group: int
    classes: int
    to_end: bool

    def __iter__(self) -> Iterator[Answer]:
        """Reads the stream up to the end of the last range, or to its own."""
        collate, source, start = Collate(self.name), self._answers(), 0
        for wanted in self.ranges:
            answers = []
            # To the end with the last batch, not after it: no one may ask for what comes then.
            stop = None if self.to_end and wanted == self.ranges[-1] else wanted.stop - start
            for place, answer in enumerate(islice(source, stop), start):
                if answer.failure:
                    yield answer
                    return
                if wanted.start <= place < wanted.stop:
                    answers.append(answer)
            start = wanted.stop
            yield collate(answers)

    def _answers(self) -> Iterator[Answer]:
        """Yields every sample, or the failure to read one; also that there are too few or too many."""
        place, promised = 0, len(self.samples)  # type: ignore[arg-type]  # checked by `Datasets`
        words = self.words(0)
        seed_all(int(words[0]))  # `iter` may draw, too
        try:
            if hasattr(self.samples, "set_epoch"):
                self.samples.set_epoch(self.epoch)
            source = iter(self.samples)
            while True:
                if place % self.group == 0:
                    words = self.words(place // self.group)
                seed_all(int(words[place % self.group]))
                try:
                    sample = next(source)
                except StopIteration:
                    break
                if place == promised:
                    yield self._miscounted(f"yields more than the {promised} samples")
                    return
                yield Answer(sample, failure=self._wrong_sample(sample, f"{self.name}: sample {place}"))
                place += 1
        except (Exception, SystemExit) as error:  # sys.exit() would end the process without a reason
            yield Answer(failure=f"{self.name}: sample {place} cannot be read: {describe(error)}")
        if place < promised:
            yield self._miscounted(f"has ended after {place} of the {promised} samples")

    def _miscounted(self, what: str) -> Answer:
        return Answer(failure=f"{self.name} {what} of its __len__: let it return how many the stream yields")

    def _wrong_sample(self, sample: Any, what: str) -> str:
        """Returns what is wrong with a sample; empty if nothing is."""
        if sample is None:
            return f"{what} is None: yield (input, target) only, as many as __len__ returns"
        return wrong_label(sample, self.classes, what)
