"""Measures local steps over a slow link between two hosts, which are network namespaces: docs/local_steps.md.

    python docs/local_steps_link.py [--rate 100000000] [--model cnn]

Needs root. Prints, for each form, the time of an update, the share of it that is not spent in meetings, and the
bytes that a host sends per update, counted at its interface.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hvd_adam import Adam, distribute, init
from hvd_adam.bench.interleave import Plan
from hvd_adam.bench.link import INTERFACE, limited_link
from hvd_adam.bench.step_worker import build_model, random_batch, training_step
from hvd_adam.bench.wire_worker import sent
from hvd_adam.distributed.local.training import meet

FORMS: dict[str, dict[str, Any]] = {
    "averaged gradients, none": {},
    "averaged gradients, int4": {"compression": "int4"},
    "local, none": {"strategy": "local"},
    "local, int4": {"strategy": "local", "compression": "int4"},
}


def measure(name: str, options: dict[str, Any], updates: int, batch_size: int) -> dict[str, float]:
    """Returns seconds, seconds in meetings and bytes, each per update."""
    cluster = init()
    torch.manual_seed(0)
    model = build_model(name)
    optimizer = distribute(Adam(model.parameters(), lr=1e-4), model, **options)
    step = training_step(model, optimizer, *random_batch(batch_size, cluster.rank, cluster.device))
    for _ in range(3):
        step()
    meet(optimizer)
    in_meetings = 0.0
    if options.get("strategy") == "local":
        original = optimizer.meet

        def timed() -> None:
            nonlocal in_meetings
            start = time.perf_counter()
            original()
            in_meetings += time.perf_counter() - start

        optimizer.meet = timed  # type: ignore[method-assign]
    cluster.barrier()
    before, start = sent(INTERFACE)["interface"], time.perf_counter()
    for _ in range(updates):
        step()
    seconds = time.perf_counter() - start
    values = {"seconds": seconds, "meetings": in_meetings, "bytes": float(sent(INTERFACE)["interface"] - before)}
    largest: dict[str, float] = {key: max(row[key] for row in cluster.gather(values)) for key in values}
    return {key: value / updates for key, value in largest.items()}


def main() -> None:
    """Makes the link and starts a rank on each host; or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=100_000_000, help="of each direction of the link, in bit/s")
    parser.add_argument("--model", default="cnn", help="cnn, or mlp")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--local-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help="of this rank")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS], help="what to measure")
    args = parser.parse_args()
    if args.form is not None:
        torch.set_num_threads(1)
        options, updates = FORMS[args.form], 4
        if options.get("strategy") == "local":
            options, updates = {**options, "local_steps": args.local_steps}, args.local_steps * args.rounds
        values = measure(args.model, options, updates, args.batch_size)
        if init().is_root:
            print("RESULT", json.dumps(values), flush=True)
        return
    horovodrun = str(Path(sys.executable).with_name("horovodrun"))
    for form in args.forms:
        command = (horovodrun, "-np", "2", "--gloo", sys.executable, *sys.argv, "--form", form)
        with limited_link(args.rate) as link:
            plan = link.over(Plan(form, {}, command))
            done = subprocess.run(
                plan.command, env={**os.environ, **plan.environ}, capture_output=True, text=True, check=False
            )
        line = next((line for line in done.stdout.splitlines() if "RESULT" in line), None)
        if line is None:
            sys.exit(f"{form}: {done.stdout}{done.stderr}")
        values = json.loads(line.partition("RESULT ")[2])
        computing = 1 - values["meetings"] / values["seconds"]
        share = f"{computing:.3f}" if "local" in form else "–"
        print(
            f"{form:26} {1000 * values['seconds']:8.1f} ms an update  {share:>6} outside meetings  "
            f"{values['bytes'] / 1e6:9.4f} MB an update",
            flush=True,
        )


if __name__ == "__main__":
    main()
