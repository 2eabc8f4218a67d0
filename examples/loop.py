"""Trains with a guard, pre-emption and checkpoints: horovodrun -np 2 python loop.py."""

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from hvd_adam import Adam, CheckpointManager, Cluster, Preemption, distribute, guard, init

UPDATES, BATCH = 200, 32  # samples per rank and update


def main(cluster: Cluster) -> bool:
    """Trains; returns whether it was stopped early."""
    torch.manual_seed(cluster.rank)  # each rank draws its own samples
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32, device=cluster.device)
    labels = torch.tensor(digits.target, device=cluster.device)

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    model.to(cluster.device)
    optimizer = distribute(Adam(model.parameters(), lr=3e-3), model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    preemption = Preemption(cluster)  # SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1, SIGUSR2

    step, stop = 0, False
    with CheckpointManager(cluster, "runs/loop", keep=2) as checkpoints:  # at its end, waits for the last one
        saved = checkpoints.restore(**parts)  # random generators too, so that each rank draws what it would have
        if saved is not None:
            step = saved["step"]
            cluster.print(f"resuming after update {step}, loss {saved['loss']:.4f}")
        while step < UPDATES and not stop:
            preemption.ask()
            samples = torch.randint(1440, (BATCH,))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[samples]), labels[samples])
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            stop = preemption.should_stop()  # the same on every rank
            if stop or step % 50 == 0:
                mean_loss = cluster.mean(loss, weight=BATCH).item()  # over the ranks
                checkpoints.save(step, extra={"loss": mean_loss}, **parts)
                cluster.print(f"update {step}  loss {mean_loss:.4f}, saving runs/loop/step-{step:08d}")

    share = slice(1440 + cluster.rank, None, cluster.size)  # of the test samples, each on one rank
    with torch.no_grad():
        hits = (model(images[share]).argmax(dim=1) == labels[share]).sum()
    counts = cluster.sum({"correct": hits, "all": len(labels[share])})
    cluster.print(f"test accuracy {counts['correct'] / counts['all']:.3f} after {step} updates")
    return stop


cluster = init()
with guard(cluster, stall_timeout=300):  # seconds
    stopped = main(cluster)
sys.exit(75 if stopped else 0)
