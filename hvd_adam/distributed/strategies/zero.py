"""`ZeroStrategy`: each rank keeps the optimizer state of one N-th of every bucket and updates it (ZeRO stage 1).

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054,
section 5.1. Gradients are reduced while backward is running, as in the default strategy. After the update every
rank sends its shard of the parameters to the others.

On GPUs and on several hosts, each bucket is reduce-scattered and the updated shards are all-gathered: together the
traffic of one all-reduce. On CPUs within one host the bucket is all-reduced and the shards are broadcast: 1.5
times that traffic, but in place, where Horovod's other collectives allocate their results. An MLP of 10.5 M
parameters on two ranks takes 65 ms per step in place, as with the default strategy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import ROOT
from hvd_adam.distributed.collectives.pieces import start_allgather
from hvd_adam.distributed.gradients.grad_scaling import square_norm
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.strategies.allreduce import AllReduceStrategy
from hvd_adam.optim.formats.eight_bit import scales_of
from hvd_adam.optim.formats.held import elements_each
from hvd_adam.optim.memory import in_place
from hvd_adam.optim.optimizer_state import STATE_NAMES, States, copy_of_states, shard_of

# Horovod does not support bfloat16: its bits are sent as float16.
_CARRIER = {torch.bfloat16: torch.float16}

# Smaller pieces of parameters are copied into one tensor and sent together.
_SMALL_ELEMENTS = 1 << 14


class ZeroStrategy(AllReduceStrategy):
    """Sharded optimizer state; `distribute(strategy="sharded")` uses it on several ranks.

    `state[p]` then holds this rank's shard of each tensor: 1-dimensional, in the order of the parameter's memory,
    possibly empty. `state_dict` returns the whole state in the common format.

    Attributes:
        exchanges: as in `AllReduceStrategy`.
        loaded: whether `state` is whole on this rank, after load_state_dict.
    """

    exchanges = True
    loaded = False

    @property
    def shard(self) -> tuple[int, int]:
        """This rank's."""
        return self.hvd.rank(), self.hvd.size()

    @property
    def scatters(self) -> bool:
        """Whether gradients are reduce-scattered; `gather_gradients` then makes them whole."""
        if self._on_gpu:
            return bool(self.hvd.nccl_built())
        return bool(self.hvd.size() != self.hvd.local_size())  # the same on all ranks

    def __init__(self, prefix: str, device: torch.device) -> None:
        super().__init__(prefix)
        self._on_gpu = device.type == "cuda"

    def norm(self, parameters: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> Tensor:
        """Returns the norm, from the squares of all shards added in rank order: identical bits on all ranks."""
        square = square_norm(self._own_gradients(buffers)).to(parameters[0].device).reshape(1)
        squares = self.hvd.allgather(square, name=f"{self.prefix}.norm")
        total: Tensor = squares.sum().sqrt()
        return total.to(torch.promote_types(buffers[0].dtype, torch.float32))

    def norm_of_gradients(self, parameters: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> Tensor:
        """Returns the norm of the whole gradients of this rank; where they are scattered, that of all shards."""
        if self.scatters:
            return self.norm(parameters, buffers)
        return super().norm_of_gradients(parameters, buffers)

    # Exchange of shards.

    def gather_gradients(self, buffers: Sequence[GradientBuffer]) -> None:
        """Makes every gradient whole on every rank. Every rank must call it."""
        if self.scatters:
            for number, buffer in enumerate(buffers):
                self._exchange(buffer, buffer.grad, f"gradients.{number}")

    def exchange_parameters(self, buffers: Sequence[GradientBuffer]) -> None:
        """Sends this rank's shard of the parameters to the others. Every rank must call it."""
        exchange = self._gather_parameters if self.scatters else self._broadcast_parameters
        for number, buffer in enumerate(buffers):
            exchange(buffer, f"{self.prefix}.parameters.{number}")

    def _gather_parameters(self, buffer: GradientBuffer, name: str) -> None:
        rank, ranks = self.shard
        gathers = []
        for number, bucket in enumerate(buffer.layout.buckets):
            start, end = bucket.shard(rank, ranks)
            own = torch.zeros(end - start, dtype=buffer.dtype, device=buffer.device)
            for piece, place in buffer.pieces(bucket, start, end):
                own[place : place + len(piece)] = piece
            gathers.append(start_allgather(_carried(own), f"{name}.{number}"))
        for bucket, gathered in zip(buffer.layout.buckets, gathers, strict=True):
            received = gathered().view(buffer.dtype).view(-1)
            start, end = bucket.shard(rank, ranks)
            others = chain(
                buffer.pieces(bucket, bucket.start, start, bucket.start),
                buffer.pieces(bucket, end, bucket.end, bucket.start),
            )
            for piece, place in others:
                piece.copy_(received[place : place + len(piece)])

    def _broadcast_parameters(self, buffer: GradientBuffer, name: str) -> None:
        own, ranks = self.shard
        handles: list[int] = []
        packed: list[tuple[list[Tensor], Tensor]] = []
        for number, bucket in enumerate(buffer.layout.buckets):
            for rank in range(ranks):
                pieces = [piece for piece, _ in buffer.pieces(bucket, *bucket.shard(rank, ranks))]
                sent = [piece for piece in pieces if len(piece) >= _SMALL_ELEMENTS]
                if small := [piece for piece in pieces if len(piece) < _SMALL_ELEMENTS]:
                    sent.append(torch.cat(small))
                    if rank != own:
                        packed.append((small, sent[-1]))
                handles += [
                    self.hvd.broadcast_async_(_carried(piece), rank, name=f"{name}.{number}.{rank}.{i}")
                    for i, piece in enumerate(sent)
                ]
        for handle in handles:
            self.hvd.synchronize(handle)
        for small, received in packed:
            torch._foreach_copy_(small, list(torch.split(received, [len(piece) for piece in small])))

    def _exchange(self, buffer: GradientBuffer, values: Tensor, name: str, each: int = 1) -> None:
        """Copies every rank's own shard of a tensor of the buffer's length / `each` to all ranks."""
        exchange = self._gather if self.scatters else self._broadcast
        exchange(buffer, _carried(values), f"{self.prefix}.{name}", each)

    def _gather(self, buffer: GradientBuffer, values: Tensor, name: str, each: int) -> None:
        gathers = []
        for number, bucket in enumerate(buffer.layout.buckets):
            start, end = bucket.shard(*self.shard)
            gathers.append(start_allgather(values[start // each : end // each], f"{name}.{number}"))
        for bucket, gathered in zip(buffer.layout.buckets, gathers, strict=True):
            values[bucket.start // each : bucket.end // each] = gathered().view(-1)

    def _broadcast(self, buffer: GradientBuffer, values: Tensor, name: str, each: int) -> None:
        ranks, handles = self.hvd.size(), []
        for number, bucket in enumerate(buffer.layout.buckets):
            for rank in range(ranks):
                start, end = bucket.shard(rank, ranks)
                shard = values[start // each : end // each]
                handles.append(self.hvd.broadcast_async_(shard, rank, name=f"{name}.{number}.{rank}"))
        for handle in handles:
            self.hvd.synchronize(handle)

    def state_is_broadcast(self, missing: Callable[[], None], own: Callable[[], None]) -> bool:
        """Returns whether rank 0 has a whole state to broadcast. Every rank must call it.

        Args:
            missing: called on ranks that have no whole state, where rank 0 has one.
            own: called on ranks that have one, where rank 0 has none.
        """
        whole = bool(self.hvd.broadcast_object(self.loaded, ROOT, name="hvd_adam.loaded"))
        if whole and not self.loaded:
            missing()
        elif self.loaded and not whole:
            own()
        self.loaded = False
        return whole

    def whole_state(
        self, state: States, buffers: Sequence[GradientBuffer], *, on_root_only: bool = False
    ) -> States:
        """Returns the whole state of every parameter, gathered one tensor kind at a time. Every rank must call it.

        Args:
            state: this rank's.
            buffers: of the gradients, whose buckets are sharded.
            on_root_only: keep it on rank 0 only, in host memory; the others need memory for one buffer at a time.

        Raises:
            RuntimeError: a state has been loaded on some ranks only, and not been broadcast.
        """
        loaded = self.hvd.allgather_object(self.loaded, name=f"{self.prefix}.loaded")
        if len(set(loaded)) > 1:
            ranks = ", ".join(str(rank) for rank, has_loaded in enumerate(loaded) if has_loaded)
            raise RuntimeError(f"a state was loaded on rank {ranks} only: call broadcast() on all ranks first")
        whole = copy_of_states(state)
        if self.loaded:
            return whole
        keep = not on_root_only or self.hvd.rank() == ROOT
        for number, buffer in enumerate(buffers):
            for (name, dtype), shards in self._kinds(buffer, state).items():
                each = elements_each(name)
                gathered = buffer.unshard(shards, dtype, *self.shard, each)
                self._exchange(buffer, gathered, f"{name}.{dtype}.{number}", each)
                if on_root_only:
                    gathered = gathered.cpu()
                for i in shards if keep else ():
                    p, first = buffer.params[i], buffer.layout.offsets[i] // each
                    scales = slice(first, first + scales_of(p.numel()))
                    whole[p][name] = in_place(buffer.view(gathered, i) if each == 1 else gathered[scales])
            for p in buffer.params:
                if "step" in whole.get(p, {}):
                    whole[p]["step"] = whole[p]["step"].clone()
        return whole

    def _kinds(self, buffer: GradientBuffer, state: States) -> Mapping[tuple[str, torch.dtype], dict[int, Tensor]]:
        """Returns this rank's shards of state tensors by name and dtype, and by index of the parameter."""
        kinds: dict[tuple[str, torch.dtype], dict[int, Tensor]] = defaultdict(dict)
        for i, (p, part) in enumerate(zip(buffer.params, buffer.parts(*self.shard), strict=True)):
            for name, t in state.get(p, {}).items():
                if name in STATE_NAMES:
                    kinds[name, t.dtype][i] = shard_of(name, t, p, part)
        return kinds

    def _own_gradients(self, buffers: Sequence[GradientBuffer]) -> list[Tensor]:
        """Returns this rank's shards of all gradients."""
        spans = [
            (buffer, span) for buffer in buffers for span in buffer.spans(buffer.collect(attach=False), self.shard)
        ]
        return [buffer.grad[start:end] for buffer, (start, end) in spans]


def _carried(values: Tensor) -> Tensor:
    """Returns the same memory in a dtype that Horovod supports."""
    return values.view(_CARRIER.get(values.dtype, values.dtype))
