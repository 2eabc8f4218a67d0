"""`AdviseConfig`: the options of `python -m hvd_adam.advise`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hvd_adam.config.options import option, positive_integer, require
from hvd_adam.errors import UserError

MOST_NUMBERS = 64  # of ranks or batches in a list
MOST_PRICE = 1e9  # of a rank and hour: the price of a job stays finite


@dataclass(frozen=True)
class AdviseConfig:
    """Advises the batch size and the number of ranks with which a run reaches a loss soonest, and cheapest."""

    EXAMPLES: ClassVar[str] = """examples:
  python -m hvd_adam.advise runs/first --measure
  python -m hvd_adam.advise runs/first --calibration calibration.json --ranks 2,4,8 --bandwidth 1Gbit --price 2
  python -m hvd_adam.advise runs/first --confirm"""

    run: tuple[str, ...] = option(
        (), "the run folder of a training with --noise-scale", path=True, positional="RUN"
    )
    batches: str | None = option(
        None, "global batches, as in 64,128 (default: 1/8 to 64 times the run's, by factors of 2)"
    )
    most_samples: int | None = option(
        None, "samples of a micro-batch that a rank's memory holds, ≥ 1; larger batches are accumulated"
    )
    measure: bool = option(
        False, "measure updates with four of the batches on this host, in runs that continue a copy of the run"
    )
    confirm: bool = option(
        False, "also train some of the batches from the newest checkpoint, and compare losses over time"
    )
    candidates: int = option(
        5,
        "batches that --confirm trains at most: the run's, the advised one, and neighbours of the better one, ≥ 2",
    )
    samples: int | None = option(
        None, "samples that --confirm trains each batch for, ≥ 1 (default: 200 updates of the run)"
    )
    np: int | None = option(
        None, "ranks on this host for --measure and --confirm, ≥ 1 (default: those of the run)"
    )
    launcher: Literal["mpi", "gloo"] = option("mpi", "controller of horovodrun for them: --mpi or --gloo")
    calibration: str | None = option(
        None, "file of hvd_adam.simulate calibrate, for other numbers of ranks", path=True
    )
    ranks: str | None = option(
        None, "with --calibration: numbers of ranks (default: 1/8 to 64 times the run's, by factors of 2)"
    )
    ranks_per_host: int | None = option(None, "with --calibration: ranks of a host, ≥ 1 (default: as calibrated)")
    network: str | None = option(
        None, "with --calibration: the network between hosts, as in hvd_adam.simulate predict"
    )
    bandwidth: str | None = option(None, "with --calibration: the bandwidth of a host, as in 1Gbit")
    price: float | None = option(
        None, "price of a rank and hour, 0 to 1e9, for the price of the run's progress so far"
    )
    json: bool = option(False, "print one JSON object instead of a table")

    def __post_init__(self) -> None:
        if len(self.run) != 1:
            raise UserError(f"{len(self.run)} run folders given: give one, as in runs/first")
        for name in ("most_samples", "samples", "np", "ranks_per_host"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(self.candidates >= 2, "candidates", self.candidates, "at least 2")
        in_range = self.price is None or 0 <= self.price <= MOST_PRICE
        require(in_range, "price", self.price, f"from 0 to {MOST_PRICE:g}")
        self.batch_list()
        self.rank_list()
        self._check_effects()

    def _check_effects(self) -> None:
        starts = "--measure or --confirm"
        needs = {
            "ranks": (self.calibration is not None, "--calibration"),
            "ranks_per_host": (self.calibration is not None, "--calibration"),
            "network": (self.calibration is not None, "--calibration"),
            "bandwidth": (self.calibration is not None, "--calibration"),
            "np": (self.measure or self.confirm, starts),
            "launcher": (self.measure or self.confirm, starts),
            "candidates": (self.confirm, "--confirm"),
            "samples": (self.confirm, "--confirm"),
        }
        for name, (has_effect, needed) in needs.items():
            if not has_effect and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"--{name.replace('_', '-')} has no effect without {needed}")

    def batch_list(self) -> tuple[int, ...]:
        """Returns the global batches that were given, ascending; none by default."""
        return _numbers("batches", self.batches)

    def rank_list(self) -> tuple[int, ...]:
        """Returns the numbers of ranks that were given, ascending; none by default."""
        return _numbers("ranks", self.ranks)


def _numbers(name: str, text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",") if word.strip()]
    numbers = [positive_integer(word) for word in words]
    valid = all(0 < number < 2**31 for number in numbers)
    valid = valid and (text is None or 0 < len(numbers) <= MOST_NUMBERS)
    require(valid, name, repr(text), f"1 to {MOST_NUMBERS} numbers from 1, as in 2,4,8")
    return tuple(sorted({*numbers}))
