"""The seconds of an update with other batches and numbers of ranks. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from hvd_adam.errors import UserError
from hvd_adam.simulate.machine import Machine
from hvd_adam.simulate.step import Setting, Step, simulate
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.simulate.workload import Workload

SLOWEST = 1e6  # times the calibration's computing
HALVINGS = 80  # of an interval: down to float64's resolution


class UpdateTime(NamedTuple):
    """Seconds of an update, and of it if network and waiting for other ranks cost nothing."""

    seconds: float
    alone: float


class StepTime(Protocol):
    """What advice needs to know of a machine."""

    def update(self, ranks: int, micro_batch: int, accumulate: int) -> UpdateTime | None:
        """Returns the time of an update; None if nothing is known of it."""


class Line(NamedTuple):
    """Seconds of an update with one micro-batch: `fixed` + `each` × its samples on a rank; neither is negative."""

    fixed: float
    each: float


def fitted(points: Sequence[tuple[int, float]]) -> Line:
    """Returns the line with the smallest sum of squared relative errors.

    Relative, because the fixed costs show in short updates, which absolute errors of long ones would hide.

    Args:
        points: samples of a micro-batch, and seconds of an update; at least one.
    """
    ones, slopes = [1 / t for _, t in points], [b / t for b, t in points]
    uu, uv, vv = (sum(x * y for x, y in zip(*xy, strict=True)) for xy in _pairs(ones, slopes))
    determinant = uu * vv - uv * uv
    if determinant > 1e-12 * uu * vv:
        fixed = (sum(ones) * vv - sum(slopes) * uv) / determinant
        each = (sum(slopes) * uu - sum(ones) * uv) / determinant
        if fixed >= 0 and each >= 0:
            return Line(fixed, each)
        if each < 0:
            return Line(sum(ones) / uu, 0.0)
    return Line(0.0, sum(slopes) / vv)


def _pairs(u: list[float], v: list[float]) -> Sequence[tuple[list[float], list[float]]]:
    return (u, u), (u, v), (v, v)


@dataclass(frozen=True)
class Measured:
    """What was measured on one number of ranks.

    Attributes:
        ranks: number of ranks.
        micro_batch: samples of a micro-batch.
        accumulate: micro-batches of an update.
        seconds: of an update with them.
        line: of updates with other batches; None if only this one was measured.
    """

    ranks: int
    micro_batch: int
    accumulate: int
    seconds: float
    line: Line | None = None

    def update(self, ranks: int, micro_batch: int, accumulate: int) -> UpdateTime | None:
        """Returns the time on the same number of ranks; with several micro-batches an upper bound.

        Each micro-batch is counted as an update, though gradients are sent and applied only once.
        """
        own = (self.micro_batch, self.accumulate)
        if ranks != self.ranks or (self.line is None and micro_batch != self.micro_batch):
            return None
        if self.line is None or (accumulate > 1 and (micro_batch, accumulate) == own):
            seconds = self.seconds * accumulate / self.accumulate
        else:
            seconds = accumulate * (self.line.fixed + self.line.each * micro_batch)
        return UpdateTime(seconds, seconds)


@dataclass(frozen=True)
class Model:
    """The cost model, with computing so fast that an update takes what was measured.

    Attributes:
        workload: of a calibration.
        machine: with the network of the job.
        per_host: ranks of a host.
        strategy: as in `distribute`.
        compression: as in `distribute`.
        measured: updates of the run. Without a line, computing is taken to be proportional to the samples: for
            larger micro-batches than the run's an upper bound. Of smaller ones nothing is known.
    """

    workload: Workload
    machine: Machine
    per_host: int
    strategy: str
    compression: str
    measured: Measured

    def update(self, ranks: int, micro_batch: int, accumulate: int) -> UpdateTime | None:
        """Returns the expected time; None if it is not known.

        Raises:
            UserError: a measured update took less than the model's update without computing.
        """
        measured = self.measured
        if measured.line is None:
            if micro_batch < measured.micro_batch:
                return None
            factor = self._factor_of_the_run * micro_batch / measured.micro_batch
        else:
            factor = self._factor(micro_batch, 1, measured.line.fixed + measured.line.each * micro_batch)
        step = self._step(ranks, micro_batch, accumulate, factor)
        return UpdateTime(step.seconds, sum(step.parts[name] for name in ("computing", "coding", "update")))

    @cached_property
    def _factor_of_the_run(self) -> float:
        measured = self.measured
        return self._factor(measured.micro_batch, measured.accumulate, measured.seconds)

    def _step(self, ranks: int, micro_batch: int, accumulate: int, factor: float) -> Step:
        work = self.workload.slower(factor, samples=micro_batch / self.workload.samples)
        setting = Setting(Ranks(ranks, min(ranks, self.per_host)), self.strategy, self.compression, accumulate)
        return simulate(work, setting, self.machine)

    def _factor(self, micro_batch: int, accumulate: int, seconds: float) -> float:
        """Bisects for the factor of computing with which an update on the measured ranks takes `seconds`."""

        def predicted(factor: float) -> float:
            return self._step(self.measured.ranks, micro_batch, accumulate, factor).seconds

        low, high, least = 0.0, SLOWEST, predicted(0.0)
        if least >= seconds:
            raise UserError(
                f"--calibration: without computing, an update on {self.measured.ranks} rank(s) would take "
                f"{least * 1e3:.3g} ms, but {seconds * 1e3:.3g} ms were measured: calibrate the machine and the "
                "network of the run, idle and with the run's launcher (MPI or Gloo)"
            )
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if predicted(middle) < seconds else (low, middle)
        return high
