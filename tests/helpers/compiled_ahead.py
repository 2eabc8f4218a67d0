"""Compiles the kernel for GPUs of compute capability 9.0 on any machine; prints the results of all cases as JSON.

python tests/helpers/compiled_ahead.py
"""

import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvd_adam.optim import triton_kernel
from hvd_adam.optim.expression import Buffers, Scalars

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SCALARS = Scalars(
    weight_decay=0.01, one_minus_beta1=0.1, beta2=0.999, one_minus_beta2=0.001, step_size=1e-3, eps=1e-8
)


def source(arguments):
    """Returns what Triton would compile when the kernel is called with these arguments, by name."""
    signature, constants, divisible = {}, {}, {}
    assert arguments.keys() == set(triton_kernel.adam.arg_names)
    for place, name in enumerate(triton_kernel.adam.arg_names):
        value = arguments[name]
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
    """Returns the buffers of one case; their values do not matter."""
    return Buffers(
        param=torch.zeros(1024, dtype=dtype),
        grad=torch.zeros(1024, dtype=dtype),
        exp_avg=torch.zeros(1024, dtype=moments),
        exp_avg_sq=torch.zeros(1024, dtype=moments),
        max_exp_avg_sq=torch.zeros(1024, dtype=moments) if amsgrad else None,
        master_param=torch.zeros(1024, dtype=torch.float32) if master else None,
    )


def compiled(rounding, decay, given, grad_scale=None, elements=1024):
    """Returns the size of the machine code and the instructions that access memory."""
    arguments = triton_kernel.arguments(rounding, decay, given, grad_scale, SCALARS, seed=7)
    arguments["elements"] = elements
    kernel = triton.compile(source(arguments), target=HOPPER, options={"num_warps": triton_kernel.WARPS})
    accesses = re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])
    return {"bytes": len(kernel.asm["cubin"]), "instructions": sorted(set(accesses))}


def main():
    """Compiles one case of each kind of code and prints the results."""
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
