"""`Cluster`: rank, world size and device of this process, and small collectives for a training loop.

PyTorch is imported inside the methods that need it: the command line imports this module to parse arguments.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cluster:
    """Rank, world size and device of this process, as `init` returns them.

    Ranks and sizes are Horovod's: one process is one rank.

    Every rank must call `barrier`, `mean`, `sum` and `gather`, in the same order. Their values are numbers,
    tensors, or dictionaries, lists and tuples of those, also nested; a whole dictionary takes one collective.
    Ranks that call different ones of these methods, or pass different keys, shapes or dtypes, all raise the same
    error. A call is refused in the block of `optimizer.join()`, where ranks that have left would not take part.
    On one rank nothing is sent.

    Attributes:
        rank: index of this process in the job, 0 ≤ rank < size.
        size: number of processes in the job, the world size, at least 1.
        local_rank: index of this process on its host, 0 ≤ local_rank < local_size.
        local_size: number of processes of the job on this host.
        cross_rank: index of this host among the hosts that have this local_rank, 0 ≤ cross_rank < cross_size.
        cross_size: number of hosts that have this local_rank.
        device: the device to put model and data on. No other rank of the job uses the same GPU.
        launcher: program that started the process: "horovodrun", "mpirun", "srun", "mpiexec", "torchrun" or
            "none".
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    device: torch.device
    launcher: str

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    def print(self, *values: object, **options: Any) -> None:
        """Prints on rank 0, and flushes, so that a launcher shows the line at once. Other ranks do nothing.

        Args:
            values: as for `print`.
            options: as for `print`; `flush` is True unless given.
        """
        if self.is_root:
            builtins.print(*values, **{"flush": True, **options})

    def barrier(self) -> None:
        """Waits until every rank has called it.

        Raises:
            CollectiveError: on every rank: another rank has called another method.
        """
        from hvd_adam.distributed.collectives import reductions

        reductions.barrier(self)

    def mean(self, value: Any, weight: float = 1.0) -> Any:
        """Returns the mean over the ranks, identical on all of them. Every rank must call it.

        With the number of samples behind the value of each rank as its weight, this is the mean over all samples:

            loss = cluster.mean(loss_of_my_samples, weight=len(my_samples))

        Args:
            value: numbers, tensors of the same shape on all ranks, or nested containers of them. It is read, and
                not changed.
            weight: of this rank's value, at least 0. The value of a rank with weight 0 does not count, whatever
                it is.

        Returns:
            sum(weight · value) / sum(weight), computed in float64, in containers like those of `value`: a float
            for a number, a float64 tensor on the same device for a tensor. NaN if all weights are 0.

        Raises:
            CollectiveError: on every rank: keys, shapes or dtypes differ, a value is of another type, or a
                weight is negative or not finite.
        """
        from hvd_adam.distributed.collectives import reductions

        return reductions.mean(self, value, weight)

    def sum(self, value: Any) -> Any:
        """Returns the sum over the ranks, identical on all of them. Every rank must call it.

        Args:
            value: as for `mean`.

        Returns:
            In containers like those of `value`: an int, or an int64 tensor, for integers and truth values, added
            exactly (sums must be below 2⁶³); a float, or a float64 tensor, for floating-point values, added in
            float64. Tensors are on the same device.

        Raises:
            CollectiveError: on every rank: keys, shapes or dtypes differ, a value is of another type, or a sum of
                integers is 2⁶³ or more (which is checked for fewer than 65,536 numbers).
        """
        from hvd_adam.distributed.collectives import reductions

        return reductions.total(self, value)

    def gather(self, value: Value) -> list[Value]:
        """Returns the values of all ranks, in the order of the ranks, on every rank. Every rank must call it.

        Args:
            value: numbers, tensors of any dtype, or nested containers of them. The first dimension of a tensor may
                differ between ranks.

        Returns:
            One value for each rank, in containers like those of `value`, with the same types and dtypes. Tensors
            are copies, without a graph, on the device of this rank's tensor.

        Raises:
            CollectiveError: on every rank: keys, shapes but for the first dimension, or dtypes differ, or a
                value is of another type.
        """
        from hvd_adam.distributed.collectives import reductions

        return reductions.gather(self, value)
