"""Gradients and residuals that are hard to encode, and a whole exchange of their codes in one process."""

import torch

from hvd_adam.distributed.wire.codec import CODECS, SMALLEST, Own, unrotate


def ties(block):
    """Returns elements whose codes are halfway between two integers, but for the largest."""
    codec = next(codec for codec in CODECS.values() if codec.block == block)
    t = torch.arange(block).remainder(2 * codec.levels) - (codec.levels - 0.5)
    t[0] = codec.levels
    return unrotate(codec, t)


# What a block of gradients and residuals may contain, as functions of normally distributed values.
KINDS = {
    "ordinary": lambda g, e: (g, e / 100),
    "only residual": lambda g, e: (g * 0, e),
    "negative zeros and a residual": lambda g, e: (g * 0 * -1, e),
    "zeros": lambda g, e: (g * 0, e * 0),
    "negative zeros": lambda g, e: (-(g * g) * 0, -(e * e) * 0),
    "only gradient": lambda g, e: (g, e * 0),
    "subnormal": lambda g, e: (g * 1e-40, e * 1e-40),
    "around the threshold": lambda g, e: (g * SMALLEST / 3, e * 0),
    "at the threshold": lambda g, e: (torch.full_like(g, SMALLEST), e * 0),
    "huge": lambda g, e: (g / g.abs().max() * 3.4e38, e),
    "huge residual": lambda g, e: (g, e / e.abs().max() * 3.4e38),
    "of many magnitudes": lambda g, e: (g * torch.exp2(e * 20), e * torch.exp2(g * 20)),
    "one large": lambda g, e: (g.index_fill(0, torch.tensor([len(g) // 3]), 1e6), e),
    "ties": lambda g, e: (ties(len(g)), e * 0),
    "infinite": lambda g, e: (g.index_fill(0, torch.tensor([len(g) - 1]), torch.inf), e),
    "infinite residual": lambda g, e: (g, e.index_fill(0, torch.tensor([0]), -torch.inf)),
    "NaN": lambda g, e: (g.index_fill(0, torch.tensor([len(g) // 2]), torch.nan), e),
    "NaN residual without gradient": lambda g, e: (g * 0, e.index_fill(0, torch.tensor([7]), torch.nan)),
}


def identical(ours, right):
    """Whether tensors have the same bits; all NaN are one."""
    return torch.equal(bits(ours), bits(right))


def bits(x):
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)


def made_of(kinds, codec, seed):
    """Returns gradients and residuals with a block of each kind."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(kinds), 2, codec.block, generator=generator)
    made = [KINDS[kind](*pair) for kind, pair in zip(kinds, drawn, strict=True)]
    return (torch.cat(parts).float() for parts in zip(*made, strict=True))


def exchange(by, codec, gradients, residual, parts, scale, unit, in_place=False, dtype=torch.float32):
    """Encodes, adds the parts as if each were of one rank, and decodes; returns all results.

    Those with "own" are of the last rank, which adds the end of the gradients without codes.
    """
    elements = len(residual) // parts
    sent = torch.full((parts, codec.payload_bytes(elements)), 0xAA, dtype=torch.uint8, device=residual.device)
    residual = residual.clone()
    missed = residual if in_place else torch.full_like(residual, torch.nan)
    by.encode(codec, gradients, residual, missed, sent, scale, unit)

    added = {}
    for name, own in (("", None), ("own ", Own(gradients[(parts - 1) * elements :], parts - 1, scale))):
        server = residual[:elements] / 16
        server_missed = server if in_place else torch.full_like(server, torch.nan)
        total = torch.full_like(sent[0], 0xAA)
        by.add_and_encode(codec, sent, own, server, server_missed, total, unit)
        added |= {f"{name}server_missed": server_missed, f"{name}total": total}

    mean = torch.full_like(gradients, torch.nan, dtype=dtype)
    by.decode(codec, sent, mean)
    return {"missed": missed, "sent": sent, "mean": mean, **added}
