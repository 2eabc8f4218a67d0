"""Compares optimizer, communication and the reading of images with other implementations and the hardware's limit.

Start it without a launcher; it starts the ranks itself.

python -m hvd_adam.bench adam --threads 1,2
python -m hvd_adam.bench allreduce --np 2 --sizes 0.25,4,40
python -m hvd_adam.bench step --np 2 --models mlp,cnn --plot step.png
python -m hvd_adam.bench wire --link 100Mbit,1Gbit
python -m hvd_adam.bench memory --np 1,2,4 --json
python -m hvd_adam.bench checkpoint --models cnn --every 10
python -m hvd_adam.bench data --images 1000,8000
"""

import os
import sys
from importlib import import_module

from hvd_adam import log
from hvd_adam.bench.config import (
    AdamConfig,
    AllreduceConfig,
    BenchConfig,
    CheckpointConfig,
    DataConfig,
    MemoryConfig,
    StepConfig,
)
from hvd_adam.bench.wire_config import WireConfig
from hvd_adam.cli import run, subcommand
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.errors import UserError
from hvd_adam.loading import loading_modules

NAME = "hvd_adam.bench"
COMMANDS: dict[str, type[BenchConfig]] = {
    "adam": AdamConfig,
    "allreduce": AllreduceConfig,
    "step": StepConfig,
    "wire": WireConfig,
    "memory": MemoryConfig,
    "checkpoint": CheckpointConfig,
    "data": DataConfig,
}


def main(argv: list[str]) -> None:
    """Takes the subcommand from the first argument, and its options from the others."""
    command = subcommand(argv, COMMANDS, NAME, __doc__ or "", kind="benchmark")

    def run_command(config: BenchConfig) -> None:
        log.setup(info_on_stderr=True)  # stdout has the result only
        measure(command, config)

    run(run_command, COMMANDS[command], f"{NAME} {command}", argv[1:], needs_extra=True)


def measure(command: str, config: BenchConfig) -> None:
    """Runs one benchmark and prints its result.

    Raises:
        UserError: the benchmark was started by a launcher, or this machine lacks something that it needs.
    """
    load = os.getloadavg()[0]  # before the benchmark adds to it
    launcher = detect_launcher().launcher
    if launcher != "none":
        raise UserError(f"started by {launcher}: start it without a launcher, it starts the ranks itself")
    with loading_modules():  # here: --help and a bad value answer before torch is loaded
        from hvd_adam.bench import report

        benchmark = import_module(f"hvd_adam.bench.{command}")
    machine = report.machine(load)
    if not config.json:
        print(report.describe(machine), flush=True)
    result = benchmark.measure(config)
    report.show(command, config, machine, result)
    if all("error" in row for row in result.rows):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
