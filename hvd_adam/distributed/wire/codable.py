"""Which gradients are sent as codes, which exactly, and which not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hvd_adam.errors import UserError

CODABLE = (torch.float32, torch.float16, torch.bfloat16)


def exact_parameters(model: torch.nn.Module) -> set[Tensor]:
    """Returns the weights of `Embedding` and `EmbeddingBag` that no module of another kind shares.

    Their gradients are sent exactly: most rows have no gradient in most updates, and would receive the rounding
    errors of their neighbours.
    """
    embeddings: set[Tensor] = set()
    others: set[Tensor] = set()
    for module in model.modules():
        is_embedding = isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag)
        (embeddings if is_embedding else others).update(module.parameters(recurse=False))
    return embeddings - others


def require_codable(trained: Iterable[Tensor], names: Mapping[Tensor, str], compression: str) -> None:
    """Refuses parameters for whose gradients there are no codes of few bits.

    Raises:
        UserError: the dtype of one is not float32, float16 or bfloat16.
    """
    for p in trained:
        if p.dtype not in CODABLE:
            raise UserError(
                f"compression {compression} does not support {p.dtype} ({names[p]}): use compression none, or "
                "float32 parameters"
            )
