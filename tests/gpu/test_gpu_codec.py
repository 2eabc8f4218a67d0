"""Codes on a GPU: the kernels against codec.py on the CPU, to the bit.

Hazards: operations that a GPU's compiler fuses or approximates; subnormal numbers that it makes 0; an incomplete
last block; a device that is not the current one.
"""

import warnings

import pytest
import torch
from helpers.codec_cases import KINDS, exchange, identical, made_of

from hvd_adam.distributed.wire.codec import CODECS
from hvd_adam.distributed.wire.fused_codec import PLAIN, functions

FORMATS = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "unit"), [(1.0, 1.0), (1 / 3, 65536.0), (0.5, 3.0)])
def test_kernels_compute_the_bits_of_codec_py(codec, dtype, scale, unit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by = functions(codec, "cuda")
    assert by != PLAIN
    for missing in (0, 5, 3 * codec.block + 1):
        gradients, residual = made_of(list(KINDS) * 2, codec, missing)
        gradients = gradients[: len(gradients) - missing].to(dtype)
        right = exchange(PLAIN, codec, gradients, residual, 4, scale, unit, dtype=dtype)
        device = torch.device("cuda", torch.cuda.device_count() - 1)
        ours = exchange(by, codec, gradients.to(device), residual.to(device), 4, scale, unit, dtype=dtype)
        for name in right:
            assert identical(ours[name].cpu(), right[name]), name
