"""Checks on any device that the fused kernels find every gradient element that is not finite."""

import math
from itertools import product

import torch

from hvd_adam import Adam


def check_one_if_finite(device, dtypes, lengths):
    """Plants infinity and NaN at the ends and in the middle of gradients of all lengths, one at a time."""
    for dtype, offset in product(dtypes, (0, 1)):  # not aligned to 16 bytes, too
        storage = [torch.zeros(length + offset, dtype=dtype, device=device) for length in lengths]
        params = [torch.nn.Parameter(values[offset:]) for values in storage]
        params.append(torch.nn.Parameter(torch.zeros(0, dtype=dtype, device=device)))
        without = torch.nn.Parameter(torch.zeros(5, dtype=dtype, device=device))
        optimizer = Adam([*params, without], implementation="fused")
        optimizer._store.ensure_layout(optimizer.param_groups, optimizer.state)
        for p in params:
            p.grad = torch.full_like(p, torch.finfo(dtype).max)
            p.grad[::2] *= -1

        def probe(optimizer=optimizer):
            return optimizer._store.probe(optimizer.param_groups).one_if_finite

        assert probe().item() == 1, dtype
        for p, bad in product(params, (math.inf, -math.inf, math.nan)):
            for place in {0, p.numel() // 2, p.numel() - 1} if p.numel() else ():
                before = p.grad[place].item()
                p.grad[place] = bad
                assert probe().isnan(), (dtype, p.numel(), place, bad)
                p.grad[place] = before
        assert probe().item() == 1, dtype
