"""The bytes that a rank sends for the gradients of one step, as docs/compression.md derives them."""

from __future__ import annotations

from torch import nn

from hvd_adam.bench.config import OURS
from hvd_adam.bench.stats import bus_bytes
from hvd_adam.distributed.wire.codable import exact_parameters
from hvd_adam.distributed.wire.codec import CODECS

POWERSGD_RANK = 4

_BYTES = {"none": 4, "fp16": 2, "bf16": 2}


def predicted_bytes(variant: str, model: nn.Module, ranks: int) -> float:
    """Returns the bytes that each of the ranks sends in a step, without headers and messages of launchers.

    Args:
        variant: a variant of `bench wire`.
        model: the model, float32; all parameters are trained.
        ranks: number of ranks, on as many hosts.
    """
    elements = sum(p.numel() for p in model.parameters())
    if not variant.startswith(OURS):
        return bus_bytes(ranks, _ddp_bytes(variant.removeprefix("ddp").removeprefix("-"), model, elements))
    strategy, compression = variant.removeprefix(OURS).split("-")
    if compression in CODECS:
        codec, embeddings = CODECS[compression], exact_parameters(model)
        exact = sum(p.numel() for p in model.parameters() if p.dim() < 2 or p in embeddings)
        # With "sharded" the second half of the codes is of parameters, and exact ones are sent, too.
        sent = 4 * exact * (1.0 if strategy == "allreduce" else 1.5)
        return bus_bytes(ranks, elements * codec.payload_bytes(codec.block) / codec.block + sent)
    gradients = elements * _BYTES[compression]
    if strategy == "allreduce":
        return bus_bytes(ranks, gradients)
    # A half each: gradients to their owners, parameters from them.
    return bus_bytes(ranks, gradients) / 2 + bus_bytes(ranks, 4 * elements) / 2


def _ddp_bytes(hook: str, model: nn.Module, elements: int) -> int:
    if hook != "powersgd":
        return elements * _BYTES[hook or "none"]
    return sum(4 * _powersgd_elements(list(p.shape)) for p in model.parameters())


def _powersgd_elements(shape: list[int]) -> int:
    """Returns the elements sent of a gradient: two factors of its matrix, if they are less than half of it."""
    rows = shape[0]
    columns = 1
    for length in shape[1:]:
        columns *= length
    factors = (rows + columns) * POWERSGD_RANK
    if len(shape) > 1 and 2 * factors < rows * columns:
        return (rows + columns) * min(rows, columns, POWERSGD_RANK)
    return rows * columns
