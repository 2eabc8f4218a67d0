"""Compares what `--tune any` chooses with the fastest of all options, on two hosts with a slow link between them.

    python tests/tune_validation.py FOLDER [--links loopback,1Gbit,300Mbit] [--models mlp] [--autotune SECONDS]

Every option is measured in turns, in the same processes as the tuning. With --autotune, Horovod's own optimizer
makes steps for so many seconds without and with HOROVOD_AUTOTUNE=1. What is in FOLDER already is not measured
again. Needs root, and an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from scaling_validation import BATCH, LEAST_BURST, MODELS, RATES, plan_of

from hvd_adam.bench.link import limited_link
from hvd_adam.training.tuning.options import command_line

LOOPBACK = "loopback"
# So that the tuning ends within a minute: by default Horovod takes samples for an hour.
AUTOTUNE = {
    "HOROVOD_AUTOTUNE": "1",
    "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1",
    "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "5",
    "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "12",
}


def measure(launcher: str, link: str, environ: dict[str, str], *module: str) -> None:
    """Runs a module on two ranks, over a link or inside this host."""
    plan = plan_of(launcher, 2, *module)
    burst = max(LEAST_BURST, RATES.get(link, 0) // 8000)
    with nullcontext() if link == LOOPBACK else limited_link(RATES[link], burst=burst) as hosts:
        plan = plan if hosts is None else hosts.over(plan, 1)
        subprocess.run(plan.command, check=True, env={**os.environ, **plan.environ, **environ})


def row(model: str, link: str, found: dict[str, Any], autotuned: dict[str, Any] | None) -> str:
    """Returns a row of the table: milliseconds of an update, and ratios."""
    grid, choice = found["grid"], found["choice"]
    chosen = command_line(choice["options"])  # without threads: each rank has one
    best = min(grid, key=grid.__getitem__)
    cells = [model, link, ms(grid["the defaults"]), chosen, ms(grid[chosen]), best, ms(grid[best])]
    ratios = grid[chosen] / grid[best], grid["the defaults"] / grid[chosen]
    cells += [f"{ratios[0]:.3f}", f"{ratios[1]:.2f}", f"{found['took']:.0f}"]
    cells += ["", ""] if autotuned is None else [ms(autotuned[key]["seconds"]) for key in ("plain", "tuned")]
    return "| " + " | ".join(cells) + " |"


def ms(seconds: float) -> str:
    """Returns milliseconds with three digits."""
    return f"{1000 * seconds:.3g}"


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher", choices=("mpi", "gloo"), default="mpi")
    parser.add_argument("--links", default=f"{LOOPBACK},1Gbit,300Mbit")
    parser.add_argument("--models", default="mlp")
    parser.add_argument("--autotune", type=float, default=0.0, help="seconds of steps with Horovod's optimizer")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    rows = []
    for model in arguments.models.split(","):
        for link in arguments.links.split(","):
            file = (arguments.folder / f"{model}-{link}.json").absolute()
            given = (MODELS[model], str(BATCH))
            if not file.exists():
                measure(arguments.launcher, link, {}, "helpers.tune_worker", *given, str(file))
            peers = file.with_suffix(".autotune")
            if arguments.autotune and not peers.exists():
                both = {}
                for name, environ in (("plain", {}), ("tuned", AUTOTUNE)):
                    steps = ("helpers.autotune_worker", *given, str(file.with_suffix(".steps")))
                    measure(arguments.launcher, link, environ, *steps, str(arguments.autotune))
                    both[name] = json.loads(file.with_suffix(".steps").read_text())
                peers.write_text(json.dumps(both))
            autotuned = json.loads(peers.read_text()) if peers.exists() else None
            rows.append(row(model, link, json.loads(file.read_text()), autotuned))
    head = "| model | link | defaults, ms | chosen | ms | fastest | ms | chosen / fastest | defaults / chosen "
    print(head + "| tuning, s | Horovod, ms | with autotune |")
    print("|---" * 12 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    sys.exit(main())
