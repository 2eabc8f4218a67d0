"""A pytest plugin: Triton's interpreter runs the kernels for GPUs in place of those for CPUs.

TRITON_INTERPRET=1 python -m pytest -p helpers.interpreted tests/test_adam.py
"""

from dataclasses import replace

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

from hvd_adam.distributed.wire import fused_codec
from hvd_adam.optim import fused

# A short example, since the interpreter runs one block after the other.
fused.register_backend("cpu", replace(fused.backend("cuda"), example_elements=5000))

compiled = fused_codec._compiled
fused_codec._compiled = lambda device_type: compiled("cuda")


def convert(values, source, target, _):
    """Converts float32 to bfloat16 as GPUs do, to nearest even; the interpreter's own function truncates."""
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    assert (source, target) == (tl.bfloat16, tl.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


interpreter._convert_float = convert
