"""Measures local steps over a slow link between two hosts, which are network namespaces.

The figures are in docs/local_steps_measured.md.

    python docs/local_steps_link.py [--rate 100000000] [--model cnn] [--ranks-per-host 1]

Needs root. Prints, for each form, the mean time of an update in whole rounds; the share of computation in it, from
the mean time of the updates without a meeting; and the bytes that a host sends per update, counted at its
interface. The first share is that of the slowest rank of each round, for which the others wait, the second the
smallest of a rank.
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

FORMS: dict[str, dict[str, Any]] = {
    "averaged gradients, none": {},
    "averaged gradients, int4": {"compression": "int4"},
    "local, none": {"strategy": "local"},
    "local, int4": {"strategy": "local", "compression": "int4"},
    "local, int4, islands": {"strategy": "local", "compression": "int4", "islands": "host"},
}


def measure(name: str, options: dict[str, Any], updates: int, batch_size: int) -> dict[str, float]:
    """Returns seconds and bytes per update, and the shares of computation of the slowest and the fastest rank."""
    rare = options.get("strategy") == "local" and "islands" not in options
    cluster = init(process_sets="islands" in options, cycle_time_ms=10 if rare else None)
    torch.manual_seed(0)
    model = build_model(name)
    optimizer = distribute(Adam(model.parameters(), lr=1e-4), model, **options)
    step = training_step(model, optimizer, *random_batch(batch_size, cluster.rank, cluster.device))
    local_steps = options.get("local_steps", 0)
    for _ in range(local_steps or 1):
        step()
    cluster.barrier()
    before, times = sent(INTERFACE)["interface"], []
    for _ in range(updates):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    total, sent_bytes = sum(times), sent(INTERFACE)["interface"] - before
    rounds = [times[i : i + local_steps - 1] for i in range(0, updates, local_steps)] if local_steps else []
    computing = [sum(alone) * local_steps / (local_steps - 1) for alone in rounds]
    ranks = cluster.gather((total, sent_bytes, computing))
    seconds, most_bytes, computing_ranks = zip(*ranks, strict=True)
    return {
        "seconds": max(seconds) / updates,
        "bytes": max(most_bytes) / updates,
        "slowest": sum(map(max, zip(*computing_ranks, strict=True))) / max(seconds),
        "fastest": min(map(sum, computing_ranks)) / max(seconds),
    }


def main() -> None:
    """Makes the link and starts a rank on each host; or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=int, default=100_000_000, help="of each direction of the link, in bit/s")
    parser.add_argument("--model", default="cnn", help="cnn, or mlp")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--local-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks-per-host", type=int, default=1)
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
        command = (
            horovodrun,
            "-np",
            str(2 * args.ranks_per_host),
            "--gloo",
            sys.executable,
            *sys.argv,
            "--form",
            form,
        )
        with limited_link(args.rate) as link:
            plan = link.over(Plan(form, {}, command), args.ranks_per_host)
            done = subprocess.run(
                plan.command, env={**os.environ, **plan.environ}, capture_output=True, text=True, check=False
            )
        line = next((line for line in done.stdout.splitlines() if "RESULT" in line), None)
        if line is None:
            sys.exit(f"{form}: {done.stdout}{done.stderr}")
        values = json.loads(line.partition("RESULT ")[2])
        share = f"{values['slowest']:.3f} computing (a rank {values['fastest']:.3f})"
        print(
            f"{form:26} {1000 * values['seconds']:8.1f} ms an update  {share if 'local' in form else '':30}  "
            f"{values['bytes'] / 1e6:9.4f} MB an update",
            flush=True,
        )


if __name__ == "__main__":
    main()
