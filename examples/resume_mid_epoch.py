"""Stops in the middle of an epoch and resumes there, bit for bit: horovodrun -np 2 python resume_mid_epoch.py.

The first start stops in the third epoch. The second one continues, and ends as `resume_mid_epoch.py never` does.
"""

import sys
import zlib

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from hvd_adam import Adam, CheckpointManager, Cluster, distribute, guard, init
from hvd_adam.data import StatefulDistributedSampler

EPOCHS = 4


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
    optimizer = distribute(Adam(model.parameters(), lr=3e-3), model)  # every rank now has rank 0's state
    parts = {"model": model, "optimizer": optimizer, "sampler": sampler}
    checkpoints = CheckpointManager(cluster, "runs/resume_mid_epoch", keep=2)
    saved = checkpoints.restore(**parts)
    update = 0 if saved is None else saved["step"]
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
    checkpoints.save(update, **parts)
    checkpoints.close()  # waits until it is written
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    print(f"rank {cluster.rank} saved after update {update}: weights {zlib.crc32(weights.numpy().tobytes()):08x}")


if __name__ == "__main__":
    cluster = init()
    with guard(cluster, stall_timeout=300):  # seconds
        main(cluster)
