"""A rank of `scaling_validation.py`: seconds of a training step of one model with each strategy and compression.

horovodrun -np 2 python -m helpers.scaling_worker MODEL BATCH OUTPUT
"""

import json
import sys
import time
from pathlib import Path

import torch

from hvd_adam.bench.config import DEFERRED, OURS
from hvd_adam.bench.step_worker import CLASSES, IMAGE, connect, random_batch, training_step
from hvd_adam.distributed.api import STRATEGIES
from hvd_adam.distributed.context import current_cluster
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.models import zoo

COMPRESSIONS = ("none", "bf16", "int8", "int4")
WARM_UP, LEAST, MOST, ENOUGH = 2, 3, 15, 2.0  # steps, and seconds after which no more are made


def main(model: str, batch: int, output: Path) -> None:
    """Measures, and writes the seconds by "strategy-compression" on rank 0."""
    launch = detect_launcher()
    times = {}
    for name in [f"{strategy}-{compression}" for strategy in STRATEGIES for compression in COMPRESSIONS]:
        wrap = connect(f"{OURS}{name}{DEFERRED}", "cpu", launch, Path())
        torch.manual_seed(0)
        net, optimizer = wrap(zoo.build(model, sample_shape=IMAGE, num_classes=CLASSES))
        step = training_step(net, optimizer, *random_batch(batch, launch.rank, torch.device("cpu")))
        times[name] = seconds(step)
    if launch.rank == 0:
        output.write_text(json.dumps(times))


def seconds(step) -> float:
    """Returns the mean duration of a step."""
    cluster = current_cluster()
    for _ in range(WARM_UP):
        step()
    before = time.perf_counter()
    step()
    count = min(MOST, max(LEAST, int(ENOUGH / cluster.mean(time.perf_counter() - before))))
    before = time.perf_counter()
    for _ in range(count):
        step()
    return cluster.mean((time.perf_counter() - before) / count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
