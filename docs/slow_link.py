"""Times the MLP's training step between two network namespaces, over a link limited to 1 Gbit/s.

    python docs/slow_link.py [--rate 1gbit] [--steps 20]

Prints the median of each controller, strategy and compression. Needs root, and what the tests on several hosts
need.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5  # steps that do not count
CASES = [("allreduce", "none"), ("allreduce", "int8"), ("allreduce", "int4"), ("sharded", "none")]


def main() -> None:
    """Runs every controller with every case, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", default="1gbit", help="limit of the link, as tc writes it")
    parser.add_argument("--steps", type=int, default=20, help="steps that count")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.cluster.hosts import HEAD, Hosts

    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    nodes = ["node1", "node2"]
    with tempfile.TemporaryDirectory(prefix="hvd_adam-slow-link-") as folder, Hosts(Path(folder), nodes) as hosts:
        for host in nodes:
            limit = f"tc qdisc add dev eth0 root tbf rate {given.rate} burst 1mb latency 50ms"
            hosts.run(host, limit.split(), check=True)
        for controller in ("mpi", "gloo"):
            for case in CASES:
                launcher = [Path(sys.executable).with_name("horovodrun"), "-np", "2", "-H", "node1:1,node2:1"]
                launcher += [f"--{controller}", "--network-interfaces", "eth0"]
                command = [*launcher, sys.executable, __file__, "--measure", *case, given.steps]
                done = hosts.run(HEAD, command, env=environ, timeout=300)
                line = next((line for line in done.stdout.splitlines() if "median" in line), done.stderr[-2000:])
                print(f"{controller:<5} {line.split('>:')[-1]}", flush=True)


def measure(strategy: str, compression: str, steps: int) -> None:
    """Trains on this rank, and prints the median on rank 0."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from hvd_adam import Adam, distribute, init

    cluster = init("cpu")
    layers = (nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10))
    model = nn.Sequential(*layers)
    optimizer = distribute(Adam(model.parameters(), lr=1e-6), model, strategy=strategy, compression=compression)
    images, labels = torch.randn(32, 3072), torch.randint(10, (32,))
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    if cluster.rank == 0:
        milliseconds = 1000 * statistics.median(times[WARM_UP:])
        print(f"{strategy:<10} {compression:<5} median {milliseconds:.0f} ms", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:4], int(sys.argv[4]))
    else:
        main()
