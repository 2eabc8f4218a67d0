"""Trains with a guard, pre-emption and checkpoints: horovodrun -np 2 python loop.py."""

import sys
from pathlib import Path

import torch

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.manager import CheckpointManager
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.recovery.preemption import Preemption

CHECKPOINTS, UPDATES = Path("runs/loop"), 50


def main(cluster: Cluster) -> bool:
    """Trains; returns whether it was stopped early."""
    preemption = Preemption(cluster, max_time=None)  # SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1, SIGUSR2
    manager = CheckpointManager(CHECKPOINTS if cluster.rank == 0 else None, keep=2)
    model = torch.nn.Linear(64, 10)
    model.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # buffers are broadcast and saved
    model.to(cluster.device)
    adam = Adam(model.parameters(), lr=1e-3)
    if cluster.rank == 0 and (CHECKPOINTS / "latest").exists():
        state = storage.load(CHECKPOINTS)  # verifies the checksum
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["optimizer"])
    optimizer = distribute(adam, model)  # every rank now has rank 0's state

    stop = False
    for update in range(int(model.updates) + 1, UPDATES + 1):
        preemption.ask()
        optimizer.zero_grad()
        model(torch.randn(32, 64, device=cluster.device)).square().mean().backward()
        optimizer.step()
        model.updates += 1
        stop = preemption.should_stop()  # the same on every rank
        if stop or update % 10 == 0:
            manager.save(update, {"model": model.state_dict(), "optimizer": optimizer.state_dict_on_root()})
        if stop:
            break
    with raise_on_all_ranks(cluster):  # the launcher ends all ranks when one exits: wait for rank 0's write
        manager.result(wait=True)
    manager.close()
    return stop


cluster = init()
with guard(cluster, stall_timeout=300):  # seconds
    stopped = main(cluster)
sys.exit(75 if stopped else 0)
