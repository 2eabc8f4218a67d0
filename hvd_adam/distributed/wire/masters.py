"""`Masters`: float32 parameters whose changes are sent to all ranks as codes (`strategy="sharded"`).

Each rank updates the masters of its shard, and sends the codes of their difference to the parameters, which all
ranks add. What the codes miss is part of the next difference, so nothing is lost (SDP4Bit, Jia et al. 2024, arXiv
2410.15526).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_adam.distributed.broadcast.tensors import ROOT, broadcast_tensors
from hvd_adam.distributed.collectives.pieces import start_allgather
from hvd_adam.distributed.context import horovod
from hvd_adam.distributed.gradients.bucket_layout import Bucket
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.distributed.wire.codec import Codec
from hvd_adam.distributed.wire.coded_bucket import Place, view
from hvd_adam.distributed.wire.master_shard import MasterShard
from hvd_adam.distributed.wire.rows import row_of_root, rows_to_root

Coded = tuple[GradientBuffer, Bucket, Mapping[Tensor, Place]]  # a bucket, with its parameters that are coded


class Known(NamedTuple):
    """A whole master, and a copy of its parameter of then."""

    master: Tensor
    parameter: Tensor

    def fits(self, p: Tensor) -> bool:
        """Returns whether the parameter still has the same shape, dtype and device."""
        known = self.master.shape, self.parameter.dtype, self.master.device
        return (p.shape, p.dtype, p.device) == known

    def now(self, p: Tensor) -> Tensor:
        """Returns the master: the parameter itself where it has been changed since, bit by bit."""
        same = self.parameter.view(torch.int32) == p.detach().view(torch.int32)
        return torch.where(same, self.master, p.detach())


class Masters:
    """The masters of an optimizer: they follow the parameters through every change of buckets.

    Half-precision parameters have none here: they are sent as they are.

    Args:
        codec: the format of what is sent; None until `use`.
        prefix: prefix of the names of the collectives, identical on all ranks and used by no other optimizer.

    Attributes:
        codec: as the argument; None while nothing is sent as codes, and parameters have no masters.
    """

    def __init__(self, codec: Codec | None, prefix: str) -> None:
        self.codec, self._prefix = codec, f"{prefix}.masters"
        self._shards: list[MasterShard] = []
        # Of parameters that are in no bucket, such as frozen ones; on every rank.
        self._parked: dict[Tensor, Known] = {}

    def use(self, codec: Codec) -> None:
        """Sends in another format from the next update on."""
        self.codec = codec
        for shard in self._shards:
            shard.use(codec)

    def leave(self) -> None:
        """Copies the masters into the parameters, in this rank's shards only, and forgets them."""
        for shard in self._coded():
            shard.write_masters()
        for p, known in self._parked.items():  # whole on every rank
            if known.fits(p):
                p.detach().copy_(known.now(p))
        self.codec, self._shards, self._parked = None, [], {}

    def start_over(self) -> None:
        """Makes the masters copies of the parameters, for example of a checkpoint."""
        for shard in self._shards:
            shard.start_over()
        self._parked = {}

    def arrange(self, buckets: Iterable[Coded]) -> None:
        """Divides the masters as new buckets are. Every rank must call it."""
        assert self.codec is not None
        rank, ranks = horovod().rank(), horovod().size()
        self._parked = {p: known for p, known in self._whole().items() if known.fits(p)}
        self._shards = [
            MasterShard(self.codec, buffer, bucket, coded, rank, ranks)
            for buffer, bucket, coded in buckets
            if buffer.dtype == torch.float32
        ]
        for shard in self._shards:
            for p in shard.coded.keys() & self._parked.keys():
                shard.put(p, self._parked.pop(p).now(p))

    def _coded(self) -> list[MasterShard]:
        """Returns the shards that have coded parameters, after they have noticed changes."""
        shards = [shard for shard in self._shards if shard.coded]
        for shard in shards:
            if shard.buffer.fits():  # else the parameters have got other shapes
                shard.notice_changes()
        return shards

    def _whole(self) -> dict[Tensor, Known]:
        """Returns whole masters, on all ranks. Every rank must call it."""
        found = dict(self._parked)
        for number, shard in enumerate(self._coded()):
            flat = horovod().allgather(shard.master, name=f"{self._prefix}.whole.{number}")
            for p, place in shard.coded.items():
                found[p] = Known(view(flat, place).clone(), p.detach().clone())
        return found

    # Updates.

    @contextmanager
    def updating(self) -> Iterator[None]:
        """In this context the parameters of this rank's shards are the masters."""
        for shard in self._shards:
            shard.begin_update()
        try:
            yield
        finally:
            for shard in self._shards:
                shard.end_update()

    def exchange(self) -> None:
        """Sends what has changed in this rank's shards to the others. Every rank must call it."""
        hvd = horovod()
        coded = [shard for shard in self._shards if shard.coded]
        gathers = [
            start_allgather(shard.encode(), f"{self._prefix}.codes.{number}") for number, shard in enumerate(coded)
        ]
        exact = [piece for rank in range(hvd.size()) for shard in self._shards for piece in shard.exact_of(rank)]
        if exact:
            own = [piece for shard in self._shards for piece in shard.own_exact()]
            sent = torch.cat(own) if own else torch.empty(0, dtype=torch.float32, device=exact[0].device)
            received = hvd.allgather(sent, name=f"{self._prefix}.exact")
            torch._foreach_copy_(exact, list(torch.split(received, list(map(len, exact)))))
        for shard, gathered in zip(coded, gathers, strict=True):
            shard.add(gathered())
        for shard in self._shards:
            shard.remember()

    # Saving.

    def on_root(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Returns whole masters by name, on the CPU, on rank 0. Every rank must call it."""
        found = _by_name(self._parked, names)
        for number, shard in enumerate(self._coded()):
            rows = rows_to_root(shard.master, f"{self._prefix}.save.{number}")
            if rows is not None:
                found |= {names[p]: view(rows.view(-1), place).clone() for p, place in shard.coded.items()}
        return found

    def everywhere(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Returns whole masters by name, on the CPU, on all ranks. Every rank must call it."""
        return _by_name(self._whole(), names)

    def load(self, saved: Mapping[str, Tensor], held: Collection[str], parameters: Mapping[str, Tensor]) -> None:
        """Replaces the masters; of those that are not saved the parameters are copied. Every rank must call it.

        Args:
            saved: on rank 0: whole masters by name.
            held: their names, on all ranks.
            parameters: by name.
        """
        names = {p: name for name, p in parameters.items()}
        self.start_over()
        for number, shard in enumerate(self._coded()):
            flat = _flat(shard, names, saved) if horovod().rank() == ROOT else None
            shard.master.copy_(row_of_root(flat, f"{self._prefix}.load.{number}"))
        divided = {p for shard in self._shards for p in shard.coded}
        for name in held:
            p = parameters[name]
            if p not in divided:
                master = _received(saved.get(name), p, f"{self._prefix}.{name}")
                if p.dtype == torch.float32:
                    self._parked[p] = Known(master, p.detach().clone())
                else:  # which has no master here
                    p.detach().copy_(master)


def apply_masters(saved: Mapping[str, Tensor], held: Collection[str], parameters: Mapping[str, Tensor]) -> None:
    """Copies masters into the parameters, for an optimizer without; see `Masters.load`. Every rank calls it."""
    for name in held:
        p = parameters[name].detach()
        p.copy_(_received(saved.get(name), p, f"hvd_adam.masters.{name}"))


def _by_name(masters: Mapping[Tensor, Known], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {names[p]: known.now(p).cpu() for p, known in masters.items() if p in names and known.fits(p)}


def _received(master: Tensor | None, p: Tensor, name: str) -> Tensor:
    """Returns a whole master of rank 0, on the parameter's device."""
    whole = torch.empty_like(p, dtype=torch.float32, requires_grad=False)
    if master is not None:
        whole.copy_(master)
    if horovod().size() > 1:
        broadcast_tensors([whole], name)
    return whole


def _flat(shard: MasterShard, names: Mapping[Tensor, str], saved: Mapping[str, Tensor]) -> Tensor:
    """Returns what all ranks start with: saved masters, else parameters; [ranks, elements], on the CPU."""
    bucket = shard.bucket
    flat = torch.zeros(bucket.end - bucket.start, dtype=torch.float32, device="cpu")
    for piece, place in shard.buffer.pieces(bucket, bucket.start, bucket.end):
        flat[place : place + len(piece)] = piece
    for p, where in shard.coded.items():
        if names[p] in saved:
            view(flat, where).copy_(saved[names[p]])
    return flat.view(horovod().size(), -1)
