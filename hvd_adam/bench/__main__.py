"""Measures beside the peers and the hardware's limit. Start it without a launcher: it starts ranks itself.

python -m hvd_adam.bench adam --threads 1,2
python -m hvd_adam.bench allreduce --np 2 --sizes 0.25,4,40
python -m hvd_adam.bench step --np 2 --models mlp,cnn --plot step.png
python -m hvd_adam.bench memory --np 1,2,4 --json
python -m hvd_adam.bench checkpoint --models cnn --every 10
"""

import os
import sys
from importlib import import_module

from hvd_adam.bench.config import (
    AdamConfig,
    AllreduceConfig,
    BenchConfig,
    CheckpointConfig,
    MemoryConfig,
    StepConfig,
)
from hvd_adam.cli import run
from hvd_adam.distributed.launch_env import detect_launcher
from hvd_adam.errors import UserError

NAME = "hvd_adam.bench"
COMMANDS: dict[str, type[BenchConfig]] = {
    "adam": AdamConfig,
    "allreduce": AllreduceConfig,
    "step": StepConfig,
    "memory": MemoryConfig,
    "checkpoint": CheckpointConfig,
}


def main(argv: list[str]) -> None:
    """Takes the subcommand from the first argument, and leaves the others to its configuration."""
    command = argv[0] if argv else ""
    if command in ("-h", "--help"):
        print(f"usage: python -m {NAME} {{{','.join(COMMANDS)}}} [options]\n\n{(__doc__ or '').strip()}\n")
        for name, config in COMMANDS.items():
            print(f"  {name:<10} {(config.__doc__ or '').splitlines()[0]}")
        sys.exit(0)
    if command not in COMMANDS:
        given = f"{command!r} is no benchmark" if command else "which benchmark?"
        print(f"{NAME}: error: {given}: use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    run(lambda config: measure(command, config), COMMANDS[command], f"{NAME} {command}", argv[1:])


def measure(command: str, config: BenchConfig) -> None:
    """Runs one benchmark and prints what came of it.

    Raises:
        UserError: started by a launcher, or something in the configuration is not to be had here.
    """
    load = os.getloadavg()[0]  # before anything of ours adds to it
    launcher = detect_launcher().launcher
    if launcher != "none":
        raise UserError(f"it was started by {launcher}: start it without a launcher, it starts ranks itself")
    from hvd_adam.bench import report  # here: --help and a bad value answer before PyTorch is loaded

    machine = report.machine(load)
    if not config.json:
        print(report.describe(machine), flush=True)
    result = import_module(f"hvd_adam.bench.{command}").measure(config)
    report.show(command, config, machine, result)
    if all("error" in row for row in result.rows):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
