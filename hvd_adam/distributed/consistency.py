"""Whether all ranks have the same weights and optimizer state, by fingerprints that cost one pass over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import JobError

_WORDS = 1 << 20  # that are looked at in one go, for the sake of memory
# At most 32 bits: times an odd number the highest bit of 64 would be the same for every place.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ over the golden ratio, as a signed number


def require_consistent(
    cluster: Cluster, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> None:
    """Compares parameters and optimizer state over the ranks, bit for bit; every rank calls it.

    Buffers are left out: each rank has batch-norm statistics of its own.

    Args:
        cluster: this process.
        model: what is trained.
        optimizer: its optimizer.
        sharded: whether each rank has another part of the state, so that only step counts can be compared.

    Raises:
        JobError: on every rank, if one differs; names the first tensor, and the ranks that are not as most are.
    """
    if cluster.size == 1:
        return
    tensors = dict(_named(model, optimizer, sharded=sharded))
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    everyones = horovod().allgather(own.unsqueeze(0), name="hvd_adam.consistency").T.tolist()
    for name, prints in zip(tensors, everyones, strict=True):
        if len(set(prints)) > 1:
            usual, _ = Counter(prints).most_common(1)[0]
            others = ", ".join(str(rank) for rank, seen in enumerate(prints) if seen != usual)
            raise JobError(
                f"the ranks have drifted apart: {name} of rank {others} is not as that of rank "
                f"{prints.index(usual)}; go on from the last checkpoint, and look for what changes weights on one "
                "rank alone, or for faulty memory"
            )


def _named(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step" or not sharded:
                yield f"{key} of {name}", value


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A number that changes with any bit of a tensor's elements: int64, 0-dimensional, on the CPU.

    The sum, modulo 2⁶⁴, of the elements' bits as integers, each times an odd number made of its place
    (Knuth, The Art of Computer Programming 3, section 6.4): an odd factor loses no bit.
    """
    elements = tensor.detach().contiguous().reshape(-1)
    words = elements.view(_INTEGERS[elements.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _WORDS):
        piece = words[start : start + _WORDS].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=tensor.device)
        total += (piece * (places * _GOLDEN | 1)).sum()
    return total.cpu()
