"""`AllReduceStrategy`: what the strategies of `distribute` do differently; here as "allreduce" does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.grad_scaling import probe_of, total_norm
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.masters import Masters
from hvd_adam.optim.optimizer_state import States


class AllReduceStrategy:
    """Every rank has all averaged gradients and the whole optimizer state, and updates all parameters.

    Args:
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other optimizer.
    """

    exchanges = False  # whether `exchange_parameters` sends anything
    masters: Masters | None = None  # of a sharded state whose gradients may be sent as codes
    loaded = False  # whether a whole state has been loaded that is not yet sharded

    def __init__(self, prefix: str) -> None:
        self.hvd = horovod()
        self.prefix = prefix

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, ranks): this rank keeps the state of the rank-th part of each bucket. (0, 1): all state."""
        return 0, 1

    @property
    def scatters(self) -> bool:
        """Whether each rank gets the averaged gradients of its own shard only."""
        return False

    @property
    def may_scatter(self) -> bool:
        """Whether that is so, or may become so with another compression."""
        return self.scatters

    def norm(self, parameters: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> Tensor:
        """Returns the 2-norm of all gradients, 0-dimensional, with identical bits on all ranks."""
        return total_norm([p.grad for p in parameters if p.grad is not None])

    def norm_of_gradients(self, parameters: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> Tensor:
        """Returns the same as `norm`, without a collective where every rank has the whole gradients."""
        return AllReduceStrategy.norm(self, parameters, buffers)

    def finite_probe(self, parameters: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> Tensor | None:
        """Returns a number, 0-dim float64, that is finite only if all gradients are; None without gradients.

        Every rank has the whole gradients, or the number is known already.
        """
        if buffers:
            spans = [(buffer, span) for buffer in buffers for span in buffer.spans(buffer.collect(attach=False))]
            gradients = [buffer.grad[start:end] for buffer, (start, end) in spans]
        else:  # an empty tensor has no largest element
            gradients = [p.grad for p in parameters if p.grad is not None and p.grad.numel()]
        return probe_of(gradients) if gradients else None

    def gather_gradients(self, buffers: Sequence[GradientBuffer]) -> None:
        """Makes every gradient whole on every rank. Every rank must call it."""

    def leave_codes(self, buffers: Sequence[GradientBuffer]) -> None:
        """Called after an update, before gradients are sent without codes. Every rank must call it."""

    def updating(self) -> AbstractContextManager[None]:
        """Returns a context for the update of the parameters."""
        return nullcontext()

    def exchange_parameters(self, buffers: Sequence[GradientBuffer]) -> None:
        """Sends what this rank has updated to the others. Every rank must call it."""

    def state_is_broadcast(self, missing: Callable[[], None], own: Callable[[], None]) -> bool:
        """Returns whether `broadcast` is to copy rank 0's state."""
        return True

    def whole_state(
        self, state: States, buffers: Sequence[GradientBuffer], *, on_root_only: bool = False
    ) -> States:
        """Returns the whole state of every parameter. Every rank must call it if the state is sharded.

        Args:
            state: this rank's.
            buffers: of the gradients, whose buckets are sharded.
            on_root_only: rank 0 only needs it, in host memory if it is gathered.
        """
        return state
