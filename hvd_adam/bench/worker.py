"""Entry point of a benchmark's ranks, started by `interleave`: ``python -m hvd_adam.bench.worker FOLDER``."""

import json
import sys
from importlib import import_module
from pathlib import Path

from hvd_adam.bench.interleave import serve
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.loading import loading_modules

# By kind of task. Only one is imported, because a rank that measures bare MPI must not load Horovod.
MODULES = {
    "allreduce": "hvd_adam.bench.allreduce_worker",
    "data": "hvd_adam.bench.data_worker",
    "memory": "hvd_adam.bench.memory_worker",
    "step": "hvd_adam.bench.step_worker",
    "wire": "hvd_adam.bench.wire_worker",
}


def main(folder: Path) -> None:
    """Prepares this rank for the group's task, and measures at each turn of the group."""
    task = json.loads((folder / "task.json").read_text())
    launch = detect_launcher()
    with loading_modules():
        module = import_module(MODULES[task["kind"]])
    serve(folder, launch.rank, lambda: module.prepare(task, launch, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
