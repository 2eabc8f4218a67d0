"""Compiles the kernels for GPUs of compute capability 9.0, and 8.0, on any machine; prints all cases as JSON.

python tests/helpers/compiled_ahead.py
"""

import json
import re
from collections import Counter

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvd_adam.distributed.wire import triton_codec
from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.kernels import triton_blocks, triton_kernel
from hvd_adam.optim.kernels.triton_nonfinite import mark_nonfinite

HOPPER, AMPERE = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32)
TABLES = ("whole", "grads", "tensor_of_block")
POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.uint8: "*u8"}


def source(kernel, arguments):
    """Returns what Triton would compile when a kernel is called with these arguments, by name."""
    signature, constants, divisible = {}, {}, {}
    assert arguments.keys() == set(kernel.arg_names)
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if value is None or name.isupper():
            signature[name], constants[place,] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS[value.dtype]
            divisible[place,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, divisible)


def compiled(
    dtype, moments, rounding="nearest", decay="none", amsgrad=False, grad_scale=None, aligned=True, several=False
):
    """Returns the size of the machine code, and how many accesses of 16 bytes it has and should have."""
    spec = KernelSpec("cuda", dtype, moments, rounding)
    arguments = {name: torch.zeros(1, dtype=torch.int64) for name in TABLES}
    in_table = dtype == torch.float64 or several
    arguments["real"] = torch.zeros(1, dtype=spec.compute_dtype) if in_table else None
    arguments |= {"device_scale": grad_scale, **dict.fromkeys(triton_kernel.REAL, 0.0)}
    arguments |= {"ALIGNED": aligned, "AMSGRAD": amsgrad, "DECAY": decay, **triton_kernel.constants(spec)}
    options = {"num_warps": triton_kernel.WARPS}
    kernel = triton.compile(source(triton_kernel.adam, arguments), target=HOPPER, options=options)
    accesses = wide_accesses(kernel.asm["ptx"])
    state = [moments] * (3 if amsgrad else 2) + [torch.float32] * (rounding == "master")
    elements = triton_kernel.BLOCK // (32 * triton_kernel.WARPS)  # of a thread
    wide = {"st": [dtype, *state], "ld": [dtype, dtype, *state]}
    expected = {name: sum(t.itemsize for t in read) * elements // 16 for name, read in wide.items()}
    return {"bytes": len(kernel.asm["cubin"]), "wide": accesses, "expected": expected if aligned else {}}


def compiled_in_blocks(dtype, rounding, state_format, moments=torch.float32, decay="none", target=HOPPER):
    """As `compiled`, of the kernel for state in few bits: of its tensors of float32, of bfloat16 and of bytes."""
    spec = KernelSpec("cuda", dtype, moments, rounding, state_format)
    arguments = {name: torch.zeros(1, dtype=torch.int64) for name in TABLES}
    arguments |= {"real": None, "device_scale": None, **dict.fromkeys(triton_blocks.REAL, 0.0)}
    arguments |= {"ALIGNED": True, "DECAY": decay, **triton_blocks.constants(spec)}
    options = {"num_warps": triton_blocks.WARPS}
    kernel = triton.compile(source(triton_blocks.adam_in_blocks, arguments), target=target, options=options)
    read = [dtype, dtype] + [torch.int8] * (rounding == "correction") + [torch.float32] * (rounding == "master")
    read += [torch.int8, torch.uint8] if state_format == "8bit" else [moments] * 2
    elements = triton_blocks.BLOCK // (32 * triton_blocks.WARPS)  # of a thread, in one access of up to 16 bytes
    wide = {"ld": read, "st": [*read[:1], *read[2:]]}
    expected = {name: sum(t.itemsize * elements // 16 for t in tensors) for name, tensors in wide.items()}
    expected["ld"] += 4 * (state_format == "8bit")  # the scales of both moments, 32 bytes for 16 lanes
    return {"bytes": len(kernel.asm["cubin"]), "wide": wide_accesses(kernel.asm["ptx"]), "expected": expected}


def compiled_probe(dtype):
    """As `compiled`, of the kernel that looks for elements that are not finite."""
    arguments = {name: torch.zeros(1, dtype=torch.int64) for name in TABLES}
    arguments |= {"mark": torch.zeros(1, dtype=torch.float64), "ALIGNED": True, "GRAD": triton_kernel.TYPES[dtype]}
    arguments |= {"WHOLE": len(triton_kernel.WHOLE), "BLOCK": triton_kernel.BLOCK}
    options = {"num_warps": triton_kernel.WARPS}
    kernel = triton.compile(source(mark_nonfinite, arguments), target=HOPPER, options=options)
    elements = triton_kernel.BLOCK // (32 * triton_kernel.WARPS)  # of a thread
    expected = {"ld": dtype.itemsize * elements // 16}
    return {"bytes": len(kernel.asm["cubin"]), "wide": wide_accesses(kernel.asm["ptx"]), "expected": expected}


def wide_accesses(ptx):
    """Returns the numbers of loads and stores of 16 bytes."""
    return Counter(re.findall(r"(ld|st)\.global\.v(?:4.b32|2.b64)", ptx))


def compiled_codec(kernel, codec, reads, writes):
    """Returns the arithmetic of a kernel for codes, and how many accesses of 16 bytes it has and should have.

    Args:
        kernel: of triton_codec.py.
        codec: the format.
        reads, writes: numbers of float32 tensors.
    """
    values = {"payload": torch.uint8, "payloads": torch.uint8, "rank": 1, "factor": 0.5, "unit": 2.0}
    values |= dict.fromkeys(("gradients", "own", "residual", "new_residual", "out"), torch.float32)
    arguments = {name: values.get(name, 3) for name in kernel.arg_names}
    tensors = {name: torch.zeros(1, dtype=v) for name, v in arguments.items() if isinstance(v, torch.dtype)}
    arguments |= tensors | triton_codec.constants(codec)
    ptx = triton.compile(source(kernel, arguments), target=HOPPER, options=triton_codec.OPTIONS).asm["ptx"]
    accesses = triton_codec.ELEMENTS // (32 * triton_codec.OPTIONS["num_warps"]) // 4  # of a thread to a tensor
    return {
        "arithmetic": sorted(set(re.findall(r"\b((?:fma|mad|div|mul|add|sub|rcp)\.[a-z.]*f32)", ptx))),
        "wide": wide_accesses(ptx),
        "expected": {"ld": reads * accesses, "st": writes * accesses},
    }


def main():
    """Compiles one case of each kind of code and prints the results."""
    single, double, brain, half = torch.float32, torch.float64, torch.bfloat16, torch.float16
    cases = {
        "float32": compiled(single, single),
        "float32, AMSGrad, coupled decay": compiled(single, single, decay="coupled", amsgrad=True),
        "float32, several groups": compiled(single, single, several=True),
        "float32, not aligned": compiled(single, single, aligned=False),
        "grad_scale on the device": compiled(single, single, grad_scale=torch.ones(())),
        "bfloat16 with masters": compiled(brain, single, "master", "decoupled"),
        "float16 with masters": compiled(half, single, "master"),
        "bfloat16, stochastic": compiled(brain, single, "stochastic"),
        "bfloat16": compiled(brain, brain),
        "finite float32": compiled_probe(single),
        "finite bfloat16": compiled_probe(brain),
        "finite float64": compiled_probe(double),
        "float64": compiled(double, double, decay="decoupled"),
    }
    single_in_blocks = (single, "nearest", "8bit")
    cases |= {
        "8bit": compiled_in_blocks(*single_in_blocks),
        "8bit, for compute capability 8.0": compiled_in_blocks(*single_in_blocks, target=AMPERE),
        "bfloat16 moments": compiled_in_blocks(single, "nearest", "bfloat16", brain, decay="decoupled"),
        "8bit with 8-bit correction": compiled_in_blocks(brain, "correction", "8bit", decay="coupled"),
        "8bit with masters": compiled_in_blocks(brain, "master", "8bit"),
    }
    kernels = {
        triton_codec.encode_blocks: (2, 1),
        triton_codec.add_and_encode_blocks: (2, 1),
        triton_codec.decode_blocks: (0, 1),
    }
    codecs = {
        f"{name}, {kernel.__name__}": compiled_codec(kernel, codec, *accesses)
        for name, codec in CODECS.items()
        for kernel, accesses in kernels.items()
    }
    print(json.dumps({"triton": triton.__version__, "cases": cases, "codecs": codecs}))


if __name__ == "__main__":
    main()
