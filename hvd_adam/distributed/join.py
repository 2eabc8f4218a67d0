"""`Join`: a block in which ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_adam.distributed.broadcast.tensors import broadcast_tensors
from hvd_adam.distributed.broadcast.training import broadcast_hyper_parameters
from hvd_adam.distributed.context import horovod
from hvd_adam.errors import JobError

REDUCE, STEP, LEFT = range(3)
_CALLS = {REDUCE: "backward()", STEP: "step()"}

_open: set[Join] = set()  # the blocks that this process is in


def refuse_in_join() -> None:
    """Refuses what sends messages of its own, in the block of another optimizer's join: not all ranks would."""
    if _open:
        raise RuntimeError(
            "ranks that have left the block of join() take part in what its optimizer does, and in nothing else: "
            "nest no second join(), train with no other optimizer, and call no method of the cluster such as "
            "mean() in the block"
        )


class Join:
    """Tells all ranks, before each reduction and each update, what comes, and which ranks still have batches.

    As `torch.distributed.algorithms.Join` does. Ranks that have left repeat what the others do.

    Args:
        optimizer: its hyper-parameters on the ranks that have left become those of a rank that has not.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other optimizer.
        divide_by_initial_world_size: divide by the number of ranks instead of those that have batches.

    Attributes:
        divides_by_all: as `divide_by_initial_world_size`.
        divisor: the number to divide sums of gradients by.
        has_left: whether this rank has.
        some_have_left: whether any rank has.
        root: a rank that has gone farthest.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, prefix: str, divide_by_initial_world_size: bool) -> None:
        refuse_in_join()
        self._optimizer, self._prefix = optimizer, prefix
        self.divides_by_all = divide_by_initial_world_size
        self.divisor = int(horovod().size())
        self.has_left = False
        self.some_have_left = False
        self.root = 0
        _open.add(self)

    def close(self) -> None:
        """Called at the end of the block."""
        _open.discard(self)

    def announce(self, call: int) -> None:
        """Called before each reduction and each update; waits for all ranks.

        Args:
            call: REDUCE or STEP.

        Raises:
            JobError: on every rank: some call `backward`, others `step`.
        """
        if not self.has_left:
            self._exchange(call)

    def leave(self, repeat: dict[int, Callable[[], None]], model: torch.nn.Module) -> None:
        """Repeats what the other ranks do until all have left. Every rank calls it.

        Args:
            repeat: takes part in a reduction, and in an update, with zeros for this rank's own gradients.
            model: gets the buffers of a rank that has gone farthest.
        """
        self.has_left = True
        while (call := self._exchange(LEFT)) != LEFT:
            repeat[call]()
        broadcast_hyper_parameters(self._optimizer, self.root)
        broadcast_tensors(model.buffers(), f"{self._prefix}.join.buffers", self.root)

    def _exchange(self, call: int) -> int:
        """Returns what the ranks that have batches call, or LEFT."""
        own = torch.tensor([call], dtype=torch.int32, device="cpu")
        calls = horovod().allgather(own, name=f"{self._prefix}.join").tolist()
        active = {rank: called for rank, called in enumerate(calls) if called != LEFT}
        if len(set(active.values())) > 1:
            found = ", ".join(f"{_CALLS[called]} on rank {rank}" for rank, called in active.items())
            raise JobError(
                f"the ranks have parted: {found}; call backward() equally often on all ranks before step(), and "
                "leave the block of join() on a rank that has no more batches"
            )
        if active:
            self.root = min(active)
            if not self.divides_by_all:
                self.divisor = len(active)
            self.some_have_left = len(active) < len(calls)
            if self.some_have_left:
                broadcast_hyper_parameters(self._optimizer, self.root)
        return int(active.get(self.root, LEFT))
