"""Which compressions `compression="auto"` may choose from."""

from __future__ import annotations

from collections.abc import Collection

import torch

from hvd_adam.distributed.wire.codable import CODABLE
from hvd_adam.distributed.wire.codec import CODECS

ANY = "auto:any"
AUTOMATIC = ("auto", "auto:lossless", ANY)
FIRST = "none"  # in use until something else is known


def is_automatic(compression: str) -> bool:
    """Returns whether a `compression` of `distribute` leaves the choice to measurements."""
    return compression in AUTOMATIC


def first_of(compression: str) -> str:
    """Returns what is in use at first with a `compression` of `distribute`."""
    return FIRST if is_automatic(compression) else compression


def is_lossless(compression: str) -> bool:
    """Returns whether a `compression` of `distribute` allows only choices that round no gradient."""
    return is_automatic(compression) and compression != ANY


def may_send_codes(compression: str) -> bool:
    """Returns whether a `compression` of `distribute` may send gradients as codes."""
    return compression in CODECS or compression == ANY


def candidates(compression: str, dtypes: Collection[torch.dtype]) -> tuple[str, ...]:
    """Returns what may be chosen, the most exact one first.

    float16 is not among them: gradients above 65504 overflow, and bfloat16 has as many bytes.

    Args:
        compression: one of `AUTOMATIC`.
        dtypes: of the gradients.
    """
    if is_lossless(compression):
        return (FIRST, "bf16") if torch.bfloat16 in dtypes else (FIRST,)
    codes = ("int8", "int4") if all(dtype in CODABLE for dtype in dtypes) else ()
    return (FIRST, "bf16", *codes)
