"""`DistributedLayout`: buckets, tables and backward hooks of an optimizer's parameters on several ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import broadcast_tensors
from hvd_adam.distributed.context import collective_prefix, horovod
from hvd_adam.distributed.gradients.averager import GradientAverager
from hvd_adam.distributed.gradients.bucket_layout import ALIGNMENT, Layout
from hvd_adam.distributed.gradients.compression import AdasumCompression
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.gradients.lockstep import Lockstep
from hvd_adam.distributed.gradients.reducer import Reducer
from hvd_adam.distributed.horovod_adapter import HorovodAdapter
from hvd_adam.distributed.strategies.allreduce import AllReduceStrategy
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.error_feedback import ErrorFeedback
from hvd_adam.errors import UserError
from hvd_adam.optim.adam import Adam
from hvd_adam.optim.formats.choice import rounding, state_format
from hvd_adam.optim.formats.random_bits import BLOCK
from hvd_adam.optim.memory import is_dense, is_ordinary, is_ordinary_type, is_trained, overlapping, same_objects
from hvd_adam.optim.optimizer_state import Group, States
from hvd_adam.optim.parameter_store import ParameterStore, StorePolicy

Names = Mapping[Tensor, str]

_REMEDY = "give it memory of its own, p.data = p.detach().clone(), or use the same torch.nn.Parameter object twice"


def _in_blocks(groups: Sequence[Group]) -> set[Tensor]:
    """Returns the parameters whose state is held in few bits: shards must not divide their blocks."""
    params = ((p, group) for group in groups for p in group["params"])
    return {p for p, group in params if state_format(group, p) != "float32" or rounding(group, p) == "correction"}


def _same_places(buffer: GradientBuffer, other: GradientBuffer) -> bool:
    return buffer.layout == other.layout and same_objects(buffer.params, other.params)


def _layout(
    params: list[Tensor], bucket_bytes: int, blocks: set[Tensor], ranks: int, control: int, multiple: int
) -> Layout:
    if blocks.isdisjoint(params):
        return Layout.of(params, bucket_bytes, ranks, control, multiple)
    alignments = [BLOCK if p in blocks else ALIGNMENT for p in params]
    return Layout.of(params, bucket_bytes, ranks, control, max(multiple, BLOCK), alignments)


def _prefixed(prefix: str, names: Names, parameters: Iterable[Tensor]) -> dict[Tensor, str]:
    """Returns the names of some parameters for Horovod, unique among all optimizers through the prefix."""
    return {p: f"{prefix}.{names[p]}" for p in parameters}


class DistributedLayout:
    """Makes the buckets that are reduced, and the tables that are updated; connects both with Horovod's hooks.

    Args:
        strategy: decides what this rank keeps of the state, and how gradients are reduced.
        averager: follows the backward passes.
        lockstep: of the averager.
        compression: format in which gradients are sent.
        bucket_bytes: the most bytes of gradients in a bucket of several parameters.
        accumulate: micro-batches per update.
        adasum: combine updates by Adasum; gradients are then not reduced.
        feedback: residuals of gradients that are, or may be, sent as codes; else None.
        lossless: as in `Reducer`.
        ahead: updates need not wait for all gradients; where they are on CPUs, see `Reducer`.

    Attributes:
        compression: as the argument; `use` changes it.
        store: of the parameters.
        buffers: of their gradients, one for each device and dtype; none on one rank and with Adasum.
    """

    def __init__(
        self,
        strategy: AllReduceStrategy,
        averager: GradientAverager,
        lockstep: Lockstep,
        *,
        compression: str,
        bucket_bytes: int,
        accumulate: int,
        adasum: bool,
        feedback: ErrorFeedback | None = None,
        lossless: bool = False,
        ahead: bool = False,
    ) -> None:
        self._strategy, self._averager, self._lockstep = strategy, averager, lockstep
        self.compression, self._bucket_bytes = compression, bucket_bytes
        self._accumulate, self._adasum = accumulate, adasum
        self._feedback, self._lossless, self._ahead = feedback, lossless, ahead
        self._ranks = int(horovod().size())
        self._flat = self._ranks > 1 and not adasum
        self._follows = self._flat  # whether autograd reports each gradient to the averager
        self._adapter: HorovodAdapter | None = None  # from `connect` on
        # Adasum steps one parameter at a time.
        policy = StorePolicy(foreach_only=adasum, agree=self._agree, warns=bool(horovod().rank() == 0))
        self.store = ParameterStore(policy)
        self.buffers: Sequence[GradientBuffer] = ()

    @property
    def trains_nothing(self) -> bool:
        """Whether all parameters are frozen."""
        return not any(p.requires_grad for buffer in self.buffers for p in buffer.params)

    @property
    def feedback(self) -> ErrorFeedback | None:
        """The residuals, if reductions have to do with any."""
        return self._feedback if self._feedback is not None and self._feedback.in_use else None

    def _agree(self, error: str | None) -> str | None:
        """Returns the same on all ranks: if one rank cannot compile, none must, or the ranks would drift apart."""
        errors = [error]
        if self._ranks > 1:
            errors = horovod().allgather_object(error, name="hvd_adam.kernels")
        return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)

    def fits(self, groups: Sequence[Group], state: States) -> bool:
        """Returns whether the layout fits parameters, state and options, after reading replaced tensors."""
        return all(buffer.fits() for buffer in self.buffers) and self.store.fits(groups, state)

    @property
    def plain_step(self) -> bool:
        """Whether the optimizer's own step is Adam's, and not that of a derived class."""
        return self._adapter is not None and self._adapter.plain_step

    def updates_sections(self, groups: Sequence[Group], state: States) -> bool:
        """Returns whether buckets can be updated one by one. It need not be the same on all ranks.

        Not by the `step` of a derived class, which may use all gradients before it calls Adam's.
        """
        return self.plain_step and self.store.all_fused and self.fits(groups, state)

    @torch.inference_mode(False)  # what is created here is written in Horovod's thread, which is not in that mode
    @torch.no_grad()
    def build(self, groups: Sequence[Group], state: States, names: Names) -> None:
        """Makes buffers for the gradients, and buckets of them, and decides what this rank updates."""
        if not self._flat:
            self.store.build_layout(groups, state)
            return
        rank, ranks = self._strategy.shard
        buffers = [GradientBuffer(params, layout) for params, layout in self._layouts(groups, names)]
        same = len(buffers) == len(self.buffers) and all(map(_same_places, buffers, self.buffers))
        self._averager.buckets_change(shards_move=not same)
        self.buffers = buffers
        parts = {
            p: part
            for buffer in self.buffers
            for p, part in zip(buffer.params, buffer.parts(rank, ranks), strict=True)
        }
        reducer = self._make_reducer(1 / (self._ranks * self._accumulate))
        sections = reducer.number if reducer.sections else None
        self.store.build_layout(groups, state, parts if ranks > 1 else None, sections)
        if self._feedback is not None:
            self._feedback.arrange(self.buffers)
        self._averager.reducer = reducer
        if self._adapter is not None:
            self._adapter.set_buckets(reducer.parameters)
            self.add_hooks(names, names)  # parameters may have been unfrozen

    def _layouts(self, groups: Sequence[Group], names: Names) -> list[tuple[list[Tensor], Layout]]:
        """Returns the trained parameters of each device and dtype, with the layout of their gradients."""
        trained = [p for group in groups for p in group["params"] if is_trained(p)]
        self._refuse_unusual(trained, names)
        if not trained:  # the ranks exchange messages nevertheless, and parameters may be unfrozen
            device = next(iter(names)).device
            trained = [torch.zeros(1, dtype=torch.float32, device=device)]
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for p in trained:
            kinds[p.device, p.dtype].append(p)
        _, ranks = self._strategy.shard
        multiple = ALIGNMENT if self._feedback is None else self._feedback.shard_multiple
        blocks = _in_blocks(groups) if ranks > 1 else set()
        control = self._lockstep.length + self._averager.noise.length
        return [
            (params, _layout(params, self._bucket_bytes, blocks, ranks, control, multiple))
            for params in kinds.values()
        ]

    def _make_reducer(self, scale: float) -> Reducer:
        return Reducer(
            self.buffers,
            collective_prefix(),
            self.compression,
            scale,
            self._strategy.scatters,
            self._feedback,
            lossless=self._lossless,
            ahead=self._ahead and all(buffer.device.type == "cpu" for buffer in self.buffers),
            noise=self._averager.noise,
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def use(self, compression: str) -> None:
        """Changes the compression. Every rank must call it, after an update and before the next forward pass.

        Buckets, and what this rank updates, stay as they are. Nothing that updates have not received is lost: see
        `ErrorFeedback`, and `CodedZeroStrategy` for masters.

        Args:
            compression: the new one. If the layout was made without `feedback`, not "int8" or "int4".
        """
        if compression == self.compression:
            return
        if self.compression in CODECS and compression not in CODECS:
            self._strategy.leave_codes(self.buffers)
            self._averager.changes_are_welcome()
        self.compression = compression
        if self._feedback is not None:
            self._feedback.use(compression, self.buffers)
        if self._averager.reducer is not None:
            self._averager.reducer = self._make_reducer(self._averager.reducer.scale)

    def _refuse_unusual(self, trained: Sequence[Tensor], names: Names) -> None:
        """Refuses parameters whose gradients cannot be averaged, or that cannot be sharded."""
        shared = overlapping(trained) if self._strategy.shard[1] > 1 else ()
        for p in trained:
            if not is_ordinary_type(type(p)):
                raise UserError(
                    f"{names[p]} is a {type(p).__qualname__}, which may keep its elements elsewhere, and cannot "
                    "be averaged: use a torch.nn.Parameter of a plain tensor"
                )
            problem = "is no ordinary tensor, and cannot be averaged" if not is_ordinary(p) else ""
            if self._strategy.shard[1] > 1 and not problem:
                if p in shared:
                    problem = "shares memory with another parameter, and cannot be sharded"
                elif not is_dense(p):
                    problem = "has gaps in memory, and cannot be sharded"
            if problem:
                raise UserError(f"{names[p]} {problem}: {_REMEDY}")

    def divide_by(self, ranks: int) -> None:
        """Divides gradients by another number of ranks from now on."""
        if self._averager.reducer is not None:
            self._averager.reducer.scale = 1 / (ranks * self._accumulate)

    def broadcast_gradients(self, root: int) -> None:
        """Copies the gradients of one rank to all ranks. Every rank must call it."""
        for number, buffer in enumerate(self.buffers):
            buffer.remember_assigned()
            present = torch.tensor(buffer.collect(), dtype=torch.bool, device="cpu")
            name = f"{self._strategy.prefix}.join.gradients.{number}"
            broadcast_tensors([present, buffer.grad], name, root)
            for i, (p, has_grad) in enumerate(zip(buffer.params, present.tolist(), strict=True)):
                p.grad = buffer.grad_view(i) if has_grad else None
            buffer.give_back()

    # Hooks.

    def connect(self, optimizer: Adam, names: Names, *, follows_passes: bool) -> HorovodAdapter:
        """Wraps an optimizer in Horovod's, whose hooks then start the reductions.

        Args:
            optimizer: the optimizer that was given to `distribute`.
            names: a name for every parameter.
            follows_passes: on one rank, where nothing is reduced: whether the averager needs its backward passes.
        """
        averager, reducer = self._averager, self._averager.reducer
        self._adapter = HorovodAdapter(
            optimizer,
            _prefixed(self._strategy.prefix, names, names),
            accumulate=self._accumulate,
            compression=AdasumCompression(self.compression),
            adasum=self._adasum,
            buckets=reducer.parameters if reducer else None,
            before_accumulation=averager.before_accumulation if self._follows or follows_passes else None,
            after_accumulation=averager.after_accumulation if self._follows else None,
            bucket_complete=self._send,
        )
        if self._flat:
            averager.hooks = self._adapter
        return self._adapter

    def _send(self, bucket: tuple[Tensor, ...]) -> None:
        if self._averager.reducer is not None:
            self._averager.reducer.send(bucket[0])

    def add_hooks(self, parameters: Iterable[Tensor], names: Names) -> None:
        """Connects the parameters that are trained and have no hooks."""
        if self._adapter is not None and self._ranks > 1:
            new = [p for p in parameters if p.requires_grad and not self._adapter.has_hook(p)]
            self._adapter.add_hooks(_prefixed(collective_prefix(), names, new) if new else {})
