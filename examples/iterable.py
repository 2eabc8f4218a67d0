"""Trains on a stream of files of different lengths: horovodrun -np 2 python iterable.py."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from hvd_adam import Adam, Cluster, distribute, guard, init
from hvd_adam.data import equal_steps, shard

LENGTHS = [500, 40, 300, 10, 400, 90, 100]  # samples in each file


class Files(IterableDataset):
    """Samples in the order of their files; here a file is a seed. The label is the largest of ten numbers."""

    def __init__(self) -> None:
        self.files = shard(range(len(LENGTHS)))  # this rank's; in a worker, those of this worker

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for file in self.files:
            generator = torch.Generator().manual_seed(file)
            for _ in range(LENGTHS[file]):
                numbers = torch.randn(10, generator=generator)
                yield numbers, numbers.argmax()


def main(cluster: Cluster) -> None:
    """Trains; every rank makes the same number of updates."""
    model = torch.nn.Linear(10, 10).to(cluster.device)
    optimizer = distribute(Adam(model.parameters(), lr=0.01), model)
    # Not forked, because MPI may be running in this process.
    workers = {"num_workers": 1, "multiprocessing_context": "forkserver", "persistent_workers": True}
    loader = DataLoader(Files(), batch_size=16, **workers)
    for epoch in range(4):
        samples = updates = 0
        for batch in equal_steps(loader, cluster, until="last"):
            optimizer.zero_grad()
            if batch is not None:  # this rank still has samples
                x, y = (tensor.to(cluster.device) for tensor in batch)
                F.cross_entropy(model(x), y).backward()
                samples += len(x)
            optimizer.step()
            updates += 1
        print(f"epoch {epoch}, rank {cluster.rank}: {samples} samples in {updates} updates", flush=True)


if __name__ == "__main__":
    cluster = init()
    with guard(cluster, stall_timeout=300):  # seconds
        main(cluster)
