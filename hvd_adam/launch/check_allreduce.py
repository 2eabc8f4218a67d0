"""Check that an allreduce works: ``horovodrun -np 2 python -m hvd_adam.launch.check_allreduce``.

The tensors are on GPUs if Horovod was built with NCCL and each local rank has a GPU, otherwise on the CPU.
"""

import horovod.torch as hvd
import torch


def main() -> None:
    """Sums rank + 1 over all ranks and exits with an error unless the result is right on this rank."""
    hvd.init()
    has_gpu = hvd.nccl_built() and torch.cuda.device_count() >= hvd.local_size()
    device = torch.device("cuda", hvd.local_rank()) if has_gpu else torch.device("cpu")
    total = hvd.allreduce(torch.full((1,), hvd.rank() + 1.0, device=device), op=hvd.Sum, name="check").item()
    expected = hvd.size() * (hvd.size() + 1) / 2
    if hvd.size() < 2 or total != expected:
        raise SystemExit(f"rank {hvd.rank()} of {hvd.size()}: the sum is {total}, expected {expected}")
    print(f"rank {hvd.rank()} of {hvd.size()} on {device}: the sum is {total}")


if __name__ == "__main__":
    main()
