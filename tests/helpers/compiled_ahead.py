"""Compiles the kernel for GPUs of compute capability 9.0, on any machine; prints what comes of each case as JSON.

python tests/helpers/compiled_ahead.py
"""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvd_adam.optim import triton_kernel

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SCALARS = (0.01, 0.1, 0.999, 0.001, 1e-3, 1e-8)


def source(arguments):
    """What the kernel is compiled from when it is called with these arguments, as Triton itself would have it."""
    signature, constants, divisible = {}, {}, {}
    for place, (name, value) in enumerate(zip(triton_kernel.adam.arg_names, arguments, strict=True)):
        if value is None or name.isupper():
            signature[name], constants[place,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                divisible[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(triton_kernel.adam, signature, constants, divisible)


def buffers(dtype, moments, amsgrad=False, master=False):
    """As many as a case has; what is in them does not matter."""
    made = {"param": dtype, "grad": dtype, "exp_avg": moments, "exp_avg_sq": moments}
    made |= {"max_exp_avg_sq": moments if amsgrad else None, "master_param": torch.float32 if master else None}
    return {name: kind and torch.zeros(1024, dtype=kind) for name, kind in made.items()}


def compiled(rounding, decay, given, grad_scale=None, elements=1024):
    """Machine code's size, and which instructions reach memory."""
    arguments = [*triton_kernel.arguments(rounding, decay, given, grad_scale, SCALARS, 7)]
    arguments[triton_kernel.adam.arg_names.index("elements")] = elements
    kernel = triton.compile(source(arguments), target=HOPPER, options={"num_warps": triton_kernel.WARPS})
    reached = re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])
    return {"bytes": len(kernel.asm["cubin"]), "instructions": sorted(set(reached))}


def main():
    """Every variant that differs in more than a number."""
    single, double, brain, half = torch.float32, torch.float64, torch.bfloat16, torch.float16
    cases = {
        "float32": compiled("nearest", "none", buffers(single, single)),
        "float32, AMSGrad, coupled decay": compiled("nearest", "coupled", buffers(single, single, amsgrad=True)),
        "more than 2³¹ elements": compiled("nearest", "none", buffers(single, single), elements=2**31),
        "grad_scale on the device": compiled("nearest", "none", buffers(single, single), torch.ones(())),
        "bfloat16 with masters": compiled("master", "decoupled", buffers(brain, single, master=True)),
        "float16 with masters": compiled("master", "none", buffers(half, single, master=True)),
        "bfloat16, stochastic": compiled("stochastic", "none", buffers(brain, single)),
        "bfloat16": compiled("nearest", "none", buffers(brain, brain)),
        "float64": compiled("nearest", "decoupled", buffers(double, double)),
    }
    print(json.dumps({"triton": triton.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
