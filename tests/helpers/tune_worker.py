"""A rank of `tune_validation.py`: what `--tune any` chooses for a model, and the time of all options.

horovodrun -np 2 python -m helpers.tune_worker MODEL BATCH OUTPUT
"""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median

from hvd_adam.config import TrainConfig
from hvd_adam.training.build_run import build_parts
from hvd_adam.training.tuning.options import BUCKETS_MIB, command_line
from hvd_adam.training.tuning.tune import Tuning, tune

TURNS = 3
UPDATES = 3  # in a turn, and one before them that is not counted


def main(model: str, batch: int, output: Path) -> None:
    """Writes the choice, how long it took, and the median seconds of an update by command line on rank 0."""
    config = TrainConfig(dataset="synthetic", synthetic_shape="3x32x32", model=model, batch_size=batch, tune="any")
    with ExitStack() as resources:
        parts, scaled = build_parts(config, None, resources)
        before = time.perf_counter()
        choice = tune(parts, config, scaled)
        took = time.perf_counter() - before
        tuning = Tuning(parts, config, scaled)
        found: dict[str, list[float]] = {}
        for _ in range(TURNS):
            for options in grid():
                laps = tuning.updates(options, UPDATES + 1)
                found.setdefault(command_line(options), []).extend(lap.seconds for lap in laps[1:])
        if parts.cluster.rank == 0:
            seconds = {name: median(times) for name, times in found.items()}
            output.write_text(json.dumps({"choice": asdict(choice), "took": took, "grid": seconds}))


def grid() -> list[dict[str, object]]:
    """Returns all options that `--tune any` could choose; those that are at their defaults are left out."""
    defaults = {"strategy": "allreduce", "compression": "none", "bucket_mib": 8.0}
    compressions = ("none", "bf16", "int8", "int4")
    every = product(("allreduce", "sharded"), compressions, BUCKETS_MIB)
    named = [dict(zip(defaults, values, strict=True)) for values in every]
    return [{name: value for name, value in each.items() if value != defaults[name]} for each in named]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
