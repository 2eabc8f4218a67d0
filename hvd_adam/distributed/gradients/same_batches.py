"""`SameBatches`: notices that all ranks train on the same batches, as with a sampler that ignores the rank.

In the first updates a few bits of a checksum travel in the message that gradients carry anyway (`lockstep`). They
are of a gradient of this rank, before it is averaged: with batches of their own the ranks differ in the first
update, and that is all. Ranks that do not differ for some updates look at the inputs of the model, for a few
more: a loss without inputs, and a batch that is the same in every update, are no mistake of a loader.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from hvd_adam.distributed.consistency import fingerprint
from hvd_adam.optim.memory import is_trained

BITS = 8  # of a checksum: ranks that differ agree by chance in one of 256 updates, and then must do so again
GRADIENTS = 2  # updates in which the gradients must agree
BATCHES = 3  # updates after these in which the inputs must agree
SAMPLES = 1 << 16  # elements of a tensor that are looked at

_NO_EVIDENCE = [1] * (2 * BITS)  # differs from whatever the other ranks send
_SILENCE = [0] * (2 * BITS)

_is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)  # from torch 2.3 on

# The models whose inputs are being looked at. Their hooks find it here: a hook that held it would be copied with a
# model, and saved.
_watched: WeakKeyDictionary[Module, SameBatches] = WeakKeyDictionary()


class SameBatches:
    """Compares the batches of all ranks in the first updates, and warns once on rank 0 if they are the same.

    A rank sends each bit of a checksum as it is and inverted. If all ranks agree on a bit, one of the two sums is
    exactly zero, whatever the dtype and the number of ranks.

    Args:
        model: whose inputs to look at, should gradients agree.
        parameters: returns the parameters whose gradients are averaged. That of the first one is in the bucket
            that carries the message, so it is still this rank's own when the message is made.
        rank: of this process.
        ranks: number of ranks.

    Attributes:
        length: of a message.
    """

    length = 2 * BITS

    def __init__(self, model: Module, parameters: Callable[[], list[Tensor]], *, rank: int, ranks: int) -> None:
        self._model, self._parameters, self._rank, self._ranks = model, parameters, rank, ranks
        self._agreed = 0  # updates in which all ranks agreed
        self._ended = ranks == 1
        self._last: int | None = None  # the checksum of the update before
        self._inputs: int | None = None  # that of the first inputs since the last message
        self._hooks: list[Any] = []

    def look_at(self, parameters: Callable[[], list[Tensor]]) -> None:
        """Replaces the function that returns the parameters, where another gradient is still this rank's own."""
        self._parameters = parameters

    def message(self) -> list[int]:
        """Returns the bits that this rank sends with the next round of gradients, `length` numbers."""
        if self._ended:
            return _SILENCE
        found = self._inputs if self._hooks else self._checksum_of_gradient()
        self._inputs, last, self._last = None, self._last, found
        if found is None or found == last:  # the same in two updates: no batch of a loader
            return _NO_EVIDENCE
        bits = [found >> i & 1 for i in range(BITS)]
        return [*bits, *(1 - bit for bit in bits)]

    def read(self, received: Sequence[float]) -> None:
        """Reads the sum of the bits of all ranks, which is the same on all of them."""
        if self._ended:
            return
        if any(a and b for a, b in zip(received[:BITS], received[BITS:], strict=True)):
            self.close()
            return
        self._agreed += 1
        if self._agreed == GRADIENTS:
            self._watch_inputs()
        if self._agreed == GRADIENTS + BATCHES:
            self.close()
            if self._rank == 0:
                _warn(self._ranks)

    def close(self) -> None:
        """Stops looking."""
        self._ended = True
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _checksum_of_gradient(self) -> int | None:
        gradient = next((p.grad for p in self._parameters() if is_trained(p)), None)
        return None if gradient is None else _checksum([gradient])

    def _watch_inputs(self) -> None:
        """Looks at the inputs of the model, or of the first of its modules that a loop calls."""
        self._last = None
        for module in self._model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            _watched[module] = self
            self._hooks.append(module.register_forward_pre_hook(note_inputs, with_kwargs=True))

    def note_inputs(self, inputs: object) -> None:
        """Called before a module of the model runs."""
        if self._inputs is None and torch.is_grad_enabled():
            # What has a graph was made from parameters, which are the same on all ranks.
            self._inputs = _checksum([t for t in _tensors(inputs) if not t.requires_grad])


def note_inputs(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook of the modules that are being looked at."""
    if not _is_compiling() and module in _watched:  # nothing of this gets into a compiled graph
        _watched[module].note_inputs((args, kwargs))


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@torch.no_grad()
def _checksum(tensors: Sequence[Tensor]) -> int | None:
    """Returns the last bits of a checksum of some of the elements; None if all of these are zero."""
    total = 0
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
            continue
        elements = tensor.detach().reshape(-1)
        elements = elements[:: len(elements) // SAMPLES | 1]  # an odd step visits all columns
        total = 31 * total + int(fingerprint(elements))
    # The high bits of the fingerprint depend on all bits of the elements.
    return total >> 32 & (1 << BITS) - 1 if total else None


def _warn(ranks: int) -> None:
    warnings.warn(
        "hvd_adam: all ranks train on the same batches: in the first updates their gradients and the inputs of "
        f"the model were identical, so {ranks} ranks do the work of one. Give each rank its own samples: use "
        "hvd_adam.data.StatefulDistributedSampler or "
        "torch.utils.data.DistributedSampler(num_replicas=cluster.size, rank=cluster.rank)",
        RuntimeWarning,
        stacklevel=2,
    )
