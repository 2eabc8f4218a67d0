"""A pytest plugin: the kernel for GPUs, run by Triton's interpreter, in place of the one for CPUs.

TRITON_INTERPRET=1 python -m pytest -p helpers.interpreted tests/test_adam.py
"""

from functools import cache

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

from hvd_adam.optim import fused

fused._COMPILERS["cpu"] = fused._COMPILERS["cuda"]
fused._EXAMPLE_ELEMENTS = 5000  # it goes from block to block
fused._cached = cache(fused._compared)  # nothing of it is kept


def convert(values, source, target, _):
    """The interpreter's own cuts bits off on the way to bfloat16, where GPUs round to nearest even."""
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    assert (source, target) == (tl.bfloat16, tl.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


interpreter._convert_float = convert
