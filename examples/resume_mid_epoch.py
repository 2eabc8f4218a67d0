"""Stops in the middle of an epoch and resumes there, bit for bit: horovodrun -np 2 python resume_mid_epoch.py.

The first start stops in the third epoch. The second one continues, and ends as `resume_mid_epoch.py never` does.
"""

import sys
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.checkpoint import storage
from hvd_adam.checkpoint.manager import CheckpointManager
from hvd_adam.data import StatefulDistributedSampler
from hvd_adam.distributed.agreement import raise_on_all_ranks
from hvd_adam.distributed.context import horovod

CHECKPOINTS, EPOCHS = Path("runs/resume_mid_epoch"), 4


class Largest(Dataset):
    """Ten random numbers, which depend on the sample's index only, not on the worker; the label is the largest."""

    def __len__(self) -> int:
        return 1440

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.randn(10, generator=torch.Generator().manual_seed(index))
        return numbers, numbers.argmax()


def main(cluster: Cluster) -> None:
    """Trains from the newest checkpoint to the next one."""
    torch.manual_seed(0)
    sampler = StatefulDistributedSampler(Largest(), global_batch_size=48)  # 30 updates in an epoch
    loader = sampler.loader(num_workers=1, multiprocessing_context="forkserver", persistent_workers=True)
    model = torch.nn.Sequential(torch.nn.Linear(10, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    model.to(cluster.device)
    adam = Adam(model.parameters(), lr=3e-3)
    manager = CheckpointManager(CHECKPOINTS if cluster.rank == 0 else None, keep=2)

    saved = {"update": 0, "sampler": sampler.state_dict()}
    with raise_on_all_ranks(cluster):
        if cluster.rank == 0 and (CHECKPOINTS / "latest").exists():
            saved = storage.load(CHECKPOINTS)
            model.load_state_dict(saved["model"])
            adam.load_state_dict(saved["optimizer"])
    update, place = horovod().broadcast_object((saved["update"], saved["sampler"]), 0)
    sampler.load_state_dict(place)
    optimizer = distribute(adam, model)  # every rank now has rank 0's state
    print(f"rank {cluster.rank} starts after update {update}, in epoch {sampler.epoch}", flush=True)

    stop_after = 70 if update == 0 and "never" not in sys.argv else None
    while sampler.epoch < EPOCHS and update != stop_after:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(cluster.device)), y.to(cluster.device)).backward()
            optimizer.step()
            update += 1
            if update == stop_after:
                break
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict_on_root()}
    manager.save(update, {"update": update, "sampler": sampler.state_dict(), **state})
    with raise_on_all_ranks(cluster):  # the launcher ends all ranks when one exits: wait for rank 0's write
        manager.result(wait=True)
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    print(f"rank {cluster.rank} saved after update {update}: weights {zlib.crc32(weights.numpy().tobytes()):08x}")


if __name__ == "__main__":
    cluster = init()
    with guard(cluster, stall_timeout=300):  # seconds
        main(cluster)
