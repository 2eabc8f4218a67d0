"""What a run folder records that advice needs: batch, noise scale, seconds of an update. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from hvd_adam.errors import UserError
from hvd_adam.report.runs import Run, load_runs, number

LAST = 0.5  # the part of the measurements, from the end, that counts
MOST = 1e15  # of any number that a run can have; a larger one is damage


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale in samples, with its 95 % interval; `high` may be infinite.

    Attributes:
        value, low, high: 0 ≤ low ≤ value ≤ high; `value` is infinite if no recent measurement is finite.
        step: updates made when it was logged.
    """

    value: float
    low: float
    high: float
    step: int


@dataclass(frozen=True)
class Record:
    """A run.

    Attributes:
        folder: the run folder.
        config: the options by name.
        ranks: number of ranks of its last job.
        global_batch: samples of an update.
        accumulate: micro-batches of a rank and update.
        train_samples: of an epoch; None if not recorded.
        parameters: number of trained ones; None if not recorded, as by an earlier version.
        updates: made so far.
        seconds: of an update: the median of the last half of those that the last job has logged.
        compression: in use.
        noise: the last finite noise scale that was logged, or how large it is at least.
    """

    folder: Path
    config: Mapping[str, Any]
    ranks: int
    global_batch: int
    accumulate: int
    train_samples: int | None
    parameters: int | None
    updates: int
    seconds: float
    compression: str
    noise: NoiseScale

    @property
    def micro_batch(self) -> int:
        """The largest number of samples of a micro-batch."""
        return -(-self.global_batch // (self.ranks * self.accumulate))


def read(path: str) -> Record:
    """Reads a run folder.

    A logged noise scale is a ratio of two means over about the last hundred measurements
    (`distributed.noise.estimate`), so the last one is that of the last part of the run.

    Raises:
        UserError: it is no run folder, is damaged, or has no noise scale or no seconds of updates.
    """
    (run,) = load_runs([path])
    if run.config is None:
        raise UserError(f"{path} has no config.yaml: give a run folder of hvd_adam.train")
    facts = {name: run.start.get(name) for name in ("world_size", "global_batch_size")}
    missing = [name for name, value in facts.items() if not isinstance(value, int) or not 1 <= value < MOST]
    if missing:
        raise UserError(f"{path}/metrics.jsonl has no start event with {missing[0]}: give another run")
    ranks, batch = int(facts["world_size"] or 0), int(facts["global_batch_size"] or 0)
    job = run.events[max(i for i, event in enumerate(run.events) if event["event"] in ("start", "resume")) :]
    logged = [number(event, "images_per_second") for event in job if event["event"] == "step"]
    rates = [rate for rate in logged if rate is not None and 1 / MOST < rate < MOST]
    if not rates:
        raise UserError(f"{path} has logged no updates since it last started: train for some updates more")
    noise = _noise(run, path)
    accumulate = run.config.get("accumulate")
    samples, parameters = number(run.data, "train_images"), number(run.start, "parameters")
    return Record(
        run.folder,
        run.config,
        ranks,
        batch,
        accumulate if isinstance(accumulate, int) and 0 < accumulate < MOST else 1,
        None if samples is None else int(samples),
        None if parameters is None else int(parameters),
        max(event["step"] for event in run.events),
        batch / median(rates[-math.ceil(LAST * len(rates)) :]),
        str(run.last("step").get("compression", "none")),
        noise,
    )


def _of_last_form(run: Run) -> list[dict[str, Any]]:
    """Returns the events since the form of the noise scale has changed, which restarts the estimate."""
    form, first = run.start.get("noise_scale_form"), 0
    for index, event in enumerate(run.events):
        if event["event"] in ("start", "resume") and event.get("noise_scale_form") != form:
            first = index + 1
    return run.events[first:]


def _noise(run: Run, path: str) -> NoiseScale:
    steps = [event for event in _of_last_form(run) if event["event"] == "step" and "noise_scale" in event]
    if not steps:
        raise UserError(
            f"{path} has no measurements of the noise scale: resume the run for some hundred updates with "
            "--noise-scale 2, and a larger --epochs if it has ended"
        )
    last = steps[-math.ceil(LAST * len(steps)) :]
    known = [event for event in last if (value := number(event, "noise_scale")) is not None and value >= 0]
    if not known:
        low = number(steps[-1], "noise_scale_low")
        if low is None:
            raise UserError(
                f"{path} has no finite noise scale: resume the run for some hundred updates more, with "
                "--noise-scale 1"
            )
        return NoiseScale(math.inf, low, math.inf, steps[-1]["step"])
    value, low, high = (number(known[-1], f"noise_scale{end}") for end in ("", "_low", "_high"))
    assert value is not None
    return NoiseScale(value, low or 0.0, math.inf if high is None else high, known[-1]["step"])
