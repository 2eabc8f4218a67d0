"""A rank of `scaling_validation.py`: seconds of a training step of one model with each strategy and compression.

horovodrun -np 2 python -m helpers.scaling_worker MODEL BATCH OUTPUT
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hvd_adam.bench.config import DEFERRED, OURS
from hvd_adam.bench.step_worker import CLASSES, IMAGE, connect, random_batch, training_step
from hvd_adam.distributed.context import current_cluster
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.models import zoo
from hvd_adam.simulate.step import STRATEGIES

COMPRESSIONS = ("none", "bf16", "int8", "int4")
COMPUTING = "computing"  # forward and backward alone
WARM_UP = 3  # steps before the first turn, and 1 in each turn of several steps
SLOW = 0.5  # seconds of a step


def main(model: str, batch: int, output: Path) -> None:
    """Measures in turns, and writes what it has measured by "strategy-compression" on rank 0.

    That is for each turn the cores that other programs used meanwhile, and the seconds of each step.
    """
    launch = detect_launcher()
    steps = {}
    for name in [f"{strategy}-{compression}" for strategy in STRATEGIES for compression in COMPRESSIONS]:
        wrap = connect(f"{OURS}{name}{DEFERRED}", "cpu", launch, Path())
        torch.manual_seed(0)
        net, optimizer = wrap(zoo.build(model, sample_shape=IMAGE, num_classes=CLASSES))
        steps[name] = training_step(net, optimizer, *random_batch(batch, launch.rank, torch.device("cpu")))
    net = zoo.build(model, sample_shape=IMAGE, num_classes=CLASSES)
    steps[COMPUTING] = training_step(net, None, *random_batch(batch, launch.rank, torch.device("cpu")))
    numbers = {name: turns_and_steps(step) for name, step in steps.items()}
    measured: dict[str, list[list[float]]] = {name: [] for name in steps}
    cluster = current_cluster()
    for turn in range(max(turns for turns, _ in numbers.values())):
        for name, step in steps.items():
            turns, count = numbers[name]
            if turn < turns:
                others, own = seconds_of_others(), os.times().user
                times = [timed(step) for _ in range(count if count == 1 else count + 1)]
                others, own = seconds_of_others() - others, os.times().user - own
                foreign = (others - cluster.size * cluster.mean(own)) / sum(times)
                measured[name].append([foreign, *times[-count:]])
    means = {name: cluster.mean(torch.tensor(turns)).tolist() for name, turns in measured.items()}
    if launch.rank == 0:
        output.write_text(json.dumps(means))


def turns_and_steps(step: Callable[[], None]) -> tuple[int, int]:
    """Returns the number of turns, and of steps in each: the same on all ranks."""
    for _ in range(WARM_UP - 1):
        step()
    seconds = current_cluster().mean(timed(step))
    return (8, min(4, max(1, int(0.4 / seconds)))) if seconds < SLOW else (6, 1)


def seconds_of_others() -> float:
    """Returns the core-seconds of this machine in programs, not in the kernel, or not given to this machine."""
    user, nice, *_, steal, _, _ = map(int, Path("/proc/stat").read_text().split()[1:11])
    return (user + nice + steal) / os.sysconf("SC_CLK_TCK")


def timed(step: Callable[[], None]) -> float:
    """Returns the seconds of a step."""
    before = time.perf_counter()
    step()
    return time.perf_counter() - before


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
