"""`tune`: which strategy and compression make the fastest step, by the cost model. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from hvd_adam.distributed.launch_env import require_no_launcher
from hvd_adam.log import write_result
from hvd_adam.simulate.config import TuneConfig
from hvd_adam.simulate.forecast import Forecast, forecast
from hvd_adam.simulate.predict import job_of
from hvd_adam.simulate.report import aligned
from hvd_adam.simulate.step import ADVISED, STRATEGIES, Setting
from hvd_adam.simulate.traffic import Ranks
from hvd_adam.training.tuning.options import changed, command_line

COMPRESSIONS = {"lossless": ("none",), "any": ADVISED}
# The model cannot distinguish options that differ by less: docs/scaling.md, "Validation".
UNCERTAIN = 0.2
HEADER = ("ranks", "step ms", "± ms", "defaults / step", "MB sent a rank", "GB memory", "options")


@dataclass(frozen=True)
class Option:
    """A combination of options, with its forecast.

    Attributes:
        strategy, compression: as in `distribute`.
        forecast: of a step.
        speedup: seconds of a step with the defaults over those with these options.
    """

    strategy: str
    compression: str
    forecast: Forecast
    speedup: float

    @property
    def command_line(self) -> str:
        """The options as they are written, or "the defaults"."""
        return command_line(changed({"strategy": self.strategy, "compression": self.compression}))


def tune(config: TuneConfig) -> None:
    """Writes the options to stdout, the fastest first.

    Raises:
        UserError: a launcher started several ranks, or as `job_of`.
    """
    require_no_launcher()
    found = list(options_of(config))
    *_, per_host, notes = job_of(config)
    if config.json:
        write_result(json.dumps([asdict(each) for each in found]) + "\n")
        return
    fastest = {each.forecast.ranks: each.forecast.step.seconds for each in reversed(found)}
    rows = [(*_cells(each), _shown(each, fastest[each.forecast.ranks])) for each in found]
    notes += [
        f"{per_host} ranks a host",
        f"~: slower than the first by less than {UNCERTAIN:.0%}, which the model cannot distinguish; "
        "hvd_adam.train --tune=any measures on the ranks of the job",
    ]
    write_result("\n".join([*aligned(HEADER, rows, texts=1), "", *notes, ""]))


def options_of(config: TuneConfig) -> Iterator[Option]:
    """Yields the options for each number of ranks, ascending, the fastest first."""
    workload, machine, per_host, _ = job_of(config)
    for number in config.numbers_of_ranks():
        ranks = Ranks(number, min(number, per_host))
        rows = {
            (strategy, name): forecast(workload, Setting(ranks, strategy, name, config.accumulate), machine)
            for strategy, name in product(STRATEGIES, COMPRESSIONS[config.allow])
        }
        default = rows["allreduce", "none"].step.seconds
        for key in sorted(rows, key=lambda key: rows[key].step.seconds):
            yield Option(*key, rows[key], default / rows[key].step.seconds)


def _cells(option: Option) -> tuple[str, ...]:
    row = option.forecast
    return (
        f"{row.ranks:,}",
        f"{row.step.seconds * 1e3:,.1f}",
        f"{row.error * 1e3:,.1f}",
        f"{option.speedup:.2f}",
        f"{row.step.sent / 1e6:,.2f}",
        f"{row.memory / 1e9:.3f}",
    )


def _shown(option: Option, fastest: float) -> str:
    similar = fastest < option.forecast.step.seconds < (1 + UNCERTAIN) * fastest
    return option.command_line + " ~" * similar
