"""Whether gradients on a GPU are finite, in Triton: one pass over them, with the tables of the update's kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# What Triton compiles is not Python: its functions have no types that mypy could check.

from __future__ import annotations

import triton
import triton.language as tl

from hvd_adam.optim.kernels.triton_kernel import pointer


@triton.jit
def mark_nonfinite(
    whole, grads, tensor_of_block, mark,
    ALIGNED: tl.constexpr, GRAD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Makes `mark` NaN if an element of one block of one gradient is infinite or NaN; else leaves it alone."""
    block = tl.program_id(0)
    tensor = tl.load(tensor_of_block + block)
    whole += tensor * WHOLE
    elements = tl.load(whole + 1)
    start = (block - tl.load(whole + 2)) * BLOCK
    places = start + tl.arange(0, BLOCK)
    grad = pointer(grads + tensor, 0, GRAD, ALIGNED) + places
    # As in triton_kernel.adam: whole blocks without a mask.
    g = tl.load(grad) if start + BLOCK <= elements else tl.load(grad, places < elements, other=0)
    if GRAD is not tl.float64:
        g = g.to(tl.float32)
    finite = (tl.abs(g) < float("inf")).to(tl.int32)
    tl.store(mark, float("nan"), tl.min(finite) == 0)
