"""Proof of a Horovod build: sums one number over the ranks, on GPUs where each local rank has one."""

import horovod.torch as hvd
import torch

if __name__ == "__main__":
    hvd.init()
    has_gpu = hvd.nccl_built() and torch.cuda.device_count() >= hvd.local_size()
    device = torch.device("cuda", hvd.local_rank()) if has_gpu else torch.device("cpu")
    total = hvd.allreduce(torch.full((1,), hvd.rank() + 1.0, device=device), op=hvd.Sum, name="check").item()
    expected = hvd.size() * (hvd.size() + 1) / 2
    if hvd.size() < 2 or total != expected:
        raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: the sum is {total}, {expected} was expected")
    print(f"rank {hvd.rank()} of {hvd.size()} on {device}: the sum is {total}")
