"""A rank of `tune_validation.py`: steps with Horovod's own optimizer, with or without its autotuning.

horovodrun -np 2 python -m helpers.autotune_worker MODEL BATCH OUTPUT SECONDS
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from hvd_adam.bench.step_worker import CLASSES, IMAGE, connect, random_batch, training_step
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.models import zoo

LAST = 20


def main(model: str, batch: int, output: Path, seconds: float) -> None:
    """Writes the median seconds of the last steps after so many seconds of steps on rank 0."""
    launch = detect_launcher()
    net = zoo.build(model, sample_shape=IMAGE, num_classes=CLASSES)
    net, optimizer = connect("horovod", "cpu", launch, Path())(net)
    step = training_step(net, optimizer, *random_batch(batch, launch.rank, torch.device("cpu")))
    end, times = time.perf_counter() + seconds, [0.0] * LAST
    while not horovod().allreduce(torch.tensor(float(time.perf_counter() > end)), name="end").item():
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    if launch.rank == 0:
        output.write_text(json.dumps({"steps": len(times) - LAST, "seconds": median(times[-LAST:])}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]))
