"""The buckets of gradients and their shards.

Hazards: buckets or shards that overlap or leave a gap; a rank's shard of a parameter that is updated to other bits
than in one process, with stochastic rounding, too.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_adam.distributed.gradients.bucket_layout import ALIGNMENT, Layout
from hvd_adam.distributed.gradients.gradient_buffer import GradientBuffer
from hvd_adam.optim.adam import Adam
from hvd_adam.optim.expression import rounding_seed
from hvd_adam.optim.memory import memory_order
from hvd_adam.optim.parameter_store import ParameterStore

SHAPES = ((3, 5), (), (7,), (0,), (2, 3, 4, 4), (1,), (33,))
STATES = ("exp_avg", "exp_avg_sq")


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    t = torch.empty(shape)
    order = draw(st.permutations(range(len(shape))))
    return t.permute(order)[..., :: draw(st.integers(1, 2))] if shape else t


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    params=st.lists(tensors(), max_size=8),
    ranks=st.integers(1, 7),
    bucket_bytes=st.one_of(st.none(), st.integers(1, 600)),
)
def test_layout_does_not_overlap_stays_in_its_buckets_and_divides_evenly(params, ranks, bucket_bytes):
    layout = Layout.of(params, bucket_bytes, ranks)
    assert len(layout.offsets) == len(params)
    end_of_bucket = last = 0
    for bucket in layout.buckets:
        assert (bucket.start, bucket.first) == (end_of_bucket, last)  # one after the other, without gap
        end_of_bucket, last = bucket.end, bucket.last
        reach = bucket.start
        for offset, p in zip(layout.offsets[bucket.first : last], params[bucket.first : last], strict=True):
            assert offset >= reach
            assert offset % ALIGNMENT == 0
            reach = offset + p.numel()
        assert reach <= bucket.flags
        assert bucket.flags + last - bucket.first <= bucket.end
        parts = [bucket.shard(rank, ranks) for rank in range(ranks)]
        assert len({end - start for start, end in parts}) == 1
        assert all(start % ALIGNMENT == 0 for start, _ in parts)
        assert [parts[0][0], *(end for _, end in parts)] == [*(start for start, _ in parts), bucket.end]
        size = sum(p.numel() * p.element_size() for p in params[bucket.first : last])
        assert (
            bucket_bytes is None
            or size <= bucket_bytes
            or sum(p.numel() > 0 for p in params[bucket.first : last]) == 1
        )
    assert (end_of_bucket, last) == (layout.total, len(params))


def wrapping_step():
    """Returns a step with seeds that pass 2**31 within the parameters of the test."""
    return next(step for step in range(1, 1 << 24) if rounding_seed(step, 0) >= 2**31 - 150)


STEP = wrapping_step()


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    values[4] = values[4].to(memory_format=torch.channels_last)
    return [torch.nn.Parameter(value) for value in values]


def stepped(dtype, option, shard, bucket_bytes):
    """Returns parameters, state and parts after step number `STEP` of a rank's shards."""
    params = parameters(dtype)
    optimizer = Adam(params, implementation="fused", weight_decay=0.1, **option)
    generator = torch.Generator().manual_seed(5)
    for i, p in enumerate(params):
        for name in STATES:
            optimizer.state[p][name] += torch.rand(p.shape, generator=generator)
        optimizer.state[p]["step"].fill_(STEP - 1)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if i != 2 else None
    buffer = GradientBuffer(params, Layout.of(params, bucket_bytes, shard[1]))
    parts = buffer.parts(*shard)
    store = ParameterStore()
    by_parameter = dict(zip(params, parts, strict=True)) if shard[1] > 1 else None
    store.build_layout(optimizer.param_groups, optimizer.state, by_parameter)
    with torch.no_grad():
        store.update(optimizer.param_groups, optimizer.state)
    return params, optimizer.state, parts


@pytest.mark.parametrize("ranks", range(1, 8))
@pytest.mark.parametrize("bucket_bytes", [None, 300])
@pytest.mark.parametrize(
    ("dtype", "option"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.bfloat16, {"master_weights": True}),
    ],
    ids=["float32", "stochastic", "master"],
)
def test_shards_of_all_ranks_tile_the_parameters_and_are_updated_to_the_bits_of_the_whole(
    ranks, bucket_bytes, dtype, option
):
    whole, whole_state, _ = stepped(dtype, option, (0, 1), bucket_bytes)
    of_ranks = [stepped(dtype, option, (rank, ranks), bucket_bytes) for rank in range(ranks)]
    for i, p in enumerate(whole):
        parts = [parts[i] for _, _, parts in of_ranks if parts[i].length]
        assert [0, *(part.skip + part.length for part in parts)] == [*(part.skip for part in parts), p.numel()]
        for params, state, parts in of_ranks:
            span = parts[i].skip, parts[i].length
            assert torch.equal(memory_order(params[i].detach(), *span), memory_order(p.detach(), *span))
            assert state[params[i]]["step"].item() == whole_state[p]["step"].item() == STEP - (i == 2)
            for name in whole_state[p].keys() - {"step"}:
                ours = (
                    state[params[i]][name].reshape(-1)
                    if ranks > 1
                    else memory_order(state[params[i]][name], *span)
                )
                assert torch.equal(ours, memory_order(whole_state[p][name], *span)), name
