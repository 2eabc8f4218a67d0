"""`python -m hvd_adam` lists the commands; `python -m hvd_adam NAME ...` is `python -m hvd_adam.NAME ...`.

Imports no torch, and nothing else that is not in the standard library.
"""

from __future__ import annotations

import difflib
import runpy
import sys

COMMANDS = {
    "train": "train a model with Adam, data-parallel over all ranks",
    "evaluate": "evaluate a checkpoint, each test image exactly once at any number of ranks",
    "predict": "classify image files with a trained model",
    "export": "write a trained model to one file for torch.export, ONNX or safetensors",
    "report": "write one HTML page that shows runs: curves, scores and what differs between them",
    "compare": "compare Adam with other optimizers over seeds, or study what its training depends on",
    "doctor": "diagnose this machine, other hosts or a job, with a remedy for each fault",
    "bench": "measure the optimizer, the reduction and whole steps against peers and the hardware's limit",
    "simulate": "predict how a job scales: step time, cost, bottleneck, and what would help",
    "advise": "advise the batch and the number of ranks with which a run reaches a loss soonest, and cheapest",
    "build_horovod": "build Horovod against the PyTorch that is installed",
}


def main(argv: list[str]) -> None:
    """Runs the command that the first argument names, with the other arguments."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m hvd_adam COMMAND [options]\n\ncommands:")
        for command, summary in COMMANDS.items():
            print(f"  {command:<15} {summary}")
        print("\nThe options of a command: python -m hvd_adam COMMAND --help")
        return
    command = name.replace("-", "_")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS) or COMMANDS
        print(f"hvd_adam: error: unknown command {name!r}: use {' or '.join(near)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = rest
    runpy.run_module(f"hvd_adam.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
