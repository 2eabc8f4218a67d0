"""Checks by fingerprints, in one pass, that all ranks have identical weights and optimizer state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from hvd_adam.distributed.context import Cluster, horovod
from hvd_adam.errors import JobError

_WORDS = 1 << 20  # processed at a time, to limit memory
# At most 32 bits: multiplied by an odd number, the highest of 64 bits would be the same at every position.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2⁶⁴ over the golden ratio, as a signed number


@torch.inference_mode(False)  # Horovod's thread is not in that mode
def require_consistent(
    cluster: Cluster, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> None:
    """Compares parameters and optimizer state of all ranks, bit for bit. Every rank calls it.

    Buffers are not compared: each rank has its own batch-norm statistics.

    Args:
        cluster: this process.
        model: the model in training.
        optimizer: its optimizer.
        sharded: whether each rank has another shard of the state; only step counts are then compared.

    Raises:
        JobError: on every rank, if a tensor differs; names the first such tensor, and the ranks that differ from
            the majority.
    """
    if cluster.size == 1:
        return
    tensors = dict(_named(model, optimizer, sharded=sharded))
    own = torch.stack([fingerprint(tensor) for tensor in tensors.values()])
    gathered = horovod().allgather(own.unsqueeze(0), name="hvd_adam.consistency").T.tolist()
    for name, prints in zip(tensors, gathered, strict=True):
        if len(set(prints)) > 1:
            usual, _ = Counter(prints).most_common(1)[0]
            others = ", ".join(str(rank) for rank, value in enumerate(prints) if value != usual)
            raise JobError(
                f"the ranks have drifted apart: {name} of rank {others} differs from rank {prints.index(usual)}; "
                "resume from the last checkpoint, and check for code that changes weights on one rank only, or "
                "for faulty memory"
            )


def _named(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor) and (key == "step" or not sharded):
                yield f"{key} of {name}", value


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a number that changes if any bit of the tensor's elements changes.

    It is the sum modulo 2⁶⁴ of the elements' bits as integers, each multiplied by an odd number that depends on
    its position (Knuth, The Art of Computer Programming 3, section 6.4); an odd factor loses no bit.

    Args:
        tensor: of any dtype, shape and device.

    Returns:
        0-dimensional, int64, on the CPU.
    """
    elements = tensor.detach().resolve_conj().resolve_neg().contiguous()
    elements = (torch.view_as_real(elements) if elements.is_complex() else elements).reshape(-1)
    words = elements.view(_INTEGERS[elements.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _WORDS):
        piece = words[start : start + _WORDS].to(torch.int64)
        positions = torch.arange(start, start + len(piece), device=tensor.device)
        total += (piece * (positions * _GOLDEN | 1)).sum()
    return total.cpu()
