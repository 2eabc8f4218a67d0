"""`IslandMean`: the mean of a vector over the islands, sent exactly or as codes with error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_adam.distributed.collectives.pieces import start_allgather, start_allreduce, start_alltoall
from hvd_adam.distributed.local.islands import Islands
from hvd_adam.distributed.wire.codec import CODECS, unrotate
from hvd_adam.distributed.wire.coded_bucket import Residual
from hvd_adam.distributed.wire.fused_codec import functions


class IslandMean:
    """The mean over the islands, in the two phases of `CodedAllReduce` where codes are sent.

    The leaders of the islands exchange; each gives the result to the other ranks of its island.

    Codes have residuals (error feedback; Karimireddy et al., arXiv 1901.09847): what the codes of a round miss is
    added in the next one. They are in units of the mean.

    Args:
        islands: the islands.
        compression: "none", "int8" or "int4".
        coded: the first elements of the vector, which are sent as codes; 0 with "none".
        device: of the vector.
        name: prefix of the names of the collectives, identical on all ranks.

    Attributes:
        worker: residual of this island's codes, float32, padded to equal parts; None without codes, and on ranks
            that are not leaders.
        server: residual of the codes of the sum of one part; rotated if the codes are.
    """

    def __init__(self, islands: Islands, compression: str, coded: int, device: torch.device, name: str) -> None:
        self._islands, self._coded, self._name = islands, coded, name
        self._codec = CODECS.get(compression) if coded and islands.is_leader else None
        self.worker: Residual | None = None
        self.server: Residual | None = None
        if self._codec is not None:
            step = islands.count * self._codec.block
            padded = -(-coded // step) * step
            self.worker = Residual(padded, device)
            self.server = Residual(padded // islands.count, device)
            self._functions = functions(self._codec, device.type)
            size = self._codec.payload_bytes(padded // islands.count)
            self._parts = torch.empty(islands.count, size, dtype=torch.uint8, device=device)
            self._total = torch.empty(size, dtype=torch.uint8, device=device)

    def average(self, vector: Tensor) -> None:
        """Makes a vector the mean over the islands, in place, with identical bits. Every rank must call it.

        `commit` or `roll_back` must follow.

        Args:
            vector: [n], contiguous; float32 if a part is coded; identical on the ranks of an island. If an element
                of any island is not finite, then an element of the result is not.
        """
        if self._islands.is_leader:
            self._exchange(vector)
        self._islands.spread(vector, f"{self._name}.mean")

    def _exchange(self, vector: Tensor) -> None:
        leaders, islands = self._islands.leaders, self._islands.count
        exact = vector[self._coded :].div_(islands)
        exact_sum = start_allreduce(exact, f"{self._name}.exact", leaders) if len(exact) else None
        if self._codec is not None and self.worker is not None and self.server is not None:
            own, (before, after) = vector[: self._coded], self.worker.advance()
            self._functions.encode(self._codec, own, before, after, self._parts, 1 / islands, 1.0)
            payloads = start_alltoall(self._parts, f"{self._name}.parts", leaders)()
            before, after = self.server.advance()
            self._functions.add_and_encode(self._codec, payloads, None, before, after, self._total, 1.0)
            sums = start_allgather(self._total, f"{self._name}.sum", leaders)()
            self._functions.decode(self._codec, sums, own)
        if exact_sum is not None:
            exact_sum()

    def commit(self) -> None:
        """Called when the mean has been used: what its codes have missed is added to the next one."""
        for residual in self._residuals():
            residual.commit()

    def roll_back(self) -> None:
        """Called when the mean is dropped: the residuals are those of before."""
        for residual in self._residuals():
            residual.roll_back()

    def state(self) -> dict[str, Tensor]:
        """Returns this island's residuals, "worker" and "server"; empty without codes."""
        if self.worker is None or self.server is None:
            return {}
        return {"worker": self.worker.committed, "server": self.server.committed}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Replaces the residuals by those of `state` of as many islands, or by zeros if they do not fit."""
        own = self.state()
        fits = {key: len(value) for key, value in saved.items()} == {key: len(own[key]) for key in own}
        for key, value in own.items():
            value.copy_(saved[key]) if fits else value.zero_()

    def unsent(self, islands: list[dict[str, Tensor]]) -> Tensor | None:
        """Returns what the codes of all islands have missed: the sum, float32, [coded]; None if of other codes.

        Args:
            islands: `state` of each island, of a job with any number of islands.
        """
        if self._codec is None or not all(islands) or len(islands[0]["worker"]) < self._coded:
            return None
        server = torch.cat([unrotate(self._codec, island["server"]) for island in islands])
        total = torch.stack([island["worker"] for island in islands]).sum(dim=0) + server
        return total[: self._coded]

    def put_unsent(self, total: Tensor) -> None:
        """Gives every island an equal share of what `unsent` has returned."""
        if self.worker is not None and self.server is not None:
            self.worker.reset()
            self.server.reset()
            self.worker.committed[: self._coded].copy_(total).div_(self._islands.count)

    def _residuals(self) -> list[Residual]:
        return [residual for residual in (self.worker, self.server) if residual is not None]
