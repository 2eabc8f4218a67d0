"""The compiled codes against codec.py, which defines them, and codec.py against an oracle in float64.

Hazards: a kernel that differs from codec.py in one bit, so that ranks with and without a compiler part: fused
multiply-adds, divisions by reciprocals, ties, zeros with a sign, subnormal, infinite and NaN values; blocks that
are dropped, or kept, otherwise; the incomplete last block; a residual in place; threads that divide blocks
wrongly; reads and writes beyond the end of a tensor; codes or scales at another place; errors beyond the bounds; a
wrong kernel, or none, that stops the job or is used.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.codec_cases import KINDS, exchange, identical, made_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from hvd_adam.distributed.wire import cpu_codec, fused_codec
from hvd_adam.distributed.wire.codec import CODECS, GROUP, SENT, Own
from hvd_adam.distributed.wire.fused_codec import PLAIN, functions

NAN_OF_ONES = float(np.uint32(0x7FFFFFFF).view(np.float32))  # whose last bits, as codes, would not be 0
FORMATS = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


@pytest.fixture(autouse=True)
def without_warning():
    """A kernel that cannot be compiled here, or is wrong, must not be replaced by what it is compared with."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "gradients are encoded without compiled kernels")
        yield


@st.composite
def cases(draw):
    codec = draw(st.sampled_from(list(CODECS.values())))
    parts = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4))
    blocks = len(kinds) * parts
    return {
        "codec": codec,
        "parts": parts,
        "kinds": (kinds * parts)[:blocks],
        "gradients": draw(st.integers(1, blocks * codec.block)),
        "scale": draw(st.sampled_from([1.0, 0.5, 1 / 3])),
        "unit": draw(st.sampled_from([1.0, 65536.0, 3.0, 1e-3])),
        "in_place": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


ALL_KINDS = [
    {"codec": codec, "parts": 2, "kinds": list(KINDS), "gradients": len(KINDS) * codec.block - 5, "scale": scale}
    | {"unit": unit, "in_place": False, "dtype": torch.float32, "seed": 0}
    for codec in CODECS.values()
    for scale, unit in ((1.0, 1.0), (1 / 3, 65536.0))
]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(ALL_KINDS[0])
@example(ALL_KINDS[1])
@example(ALL_KINDS[2])
@example(ALL_KINDS[3])
@given(case=cases())
def test_kernels_compute_the_bits_of_codec_py(case):
    codec, dtype = case["codec"], case["dtype"]
    gradients, residual = made_of(case["kinds"], codec, case["seed"])
    gradients = gradients[: case["gradients"]].to(dtype)
    arguments = codec, gradients, residual, case["parts"], case["scale"], case["unit"], case["in_place"], dtype
    ours, right = (exchange(by, *arguments) for by in (functions(codec, "cpu"), PLAIN))
    for name in right:
        assert identical(ours[name], right[name]), name


@FORMATS
@pytest.mark.parametrize("broken", [torch.nan, NAN_OF_ONES, torch.inf, -torch.inf])
def test_one_broken_element_at_any_position_makes_its_block_nan_and_no_other(codec, broken):
    blocks = codec.block + 1  # the last one stays whole
    gradients = torch.randn(blocks, codec.block, generator=torch.Generator().manual_seed(1))
    gradients[range(codec.block), range(codec.block)] = broken
    results = exchange(
        functions(codec, "cpu"), codec, gradients.view(-1), torch.zeros(gradients.numel()), 1, 1.0, 1.0
    )
    mean = results["mean"].view_as(gradients)
    assert mean[:-1].isnan().all()
    assert mean[-1].isfinite().all()
    assert (results["sent"][0, : codec.code_bytes(codec.block * codec.block)] == 0).all()  # all ranks get the same
    missed = results["missed"].view_as(gradients)
    assert missed[:-1].isnan().all()
    assert missed[-1].isfinite().all()


@FORMATS
def test_number_of_threads_changes_no_bit(codec):
    kinds = ["ordinary", "only residual", "huge"] * (120_000 // (3 * codec.block))
    gradients, residual = made_of(kinds, codec, 2)
    arguments = codec, gradients[:-7], residual, 3, 0.5, 4.0
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(exchange(functions(codec, "cpu"), *arguments))
    torch.set_num_threads(before)
    for other in (*results[1:], exchange(PLAIN, *arguments)):
        assert all(identical(other[name], results[0][name]) for name in other)


@FORMATS
def test_kernels_neither_read_nor_write_beyond_the_end_of_a_tensor(codec):
    by = functions(codec, "cpu")
    guard, parts, part = 64, 2, 3 * codec.block

    def guarded(elements, dtype=torch.float32, value=torch.nan):
        whole = torch.full((elements + 2 * guard,), 0x55 if dtype == torch.uint8 else torch.nan, dtype=dtype)
        inside = whole[guard:-guard]
        inside.fill_(0 if dtype == torch.uint8 else value)
        return whole, inside

    for missing in (0, 1, codec.block - 1, codec.block, codec.block + 1, 2 * codec.block, 5 * codec.block + 9):
        count = parts * part - missing
        around = {
            "gradients": guarded(count, value=1.0),
            "residual": guarded(parts * part, value=0.5),
            "sent": guarded(parts * codec.payload_bytes(part), torch.uint8),
            "server": guarded(part, value=0.25),
            "total": guarded(codec.payload_bytes(part), torch.uint8),
            "mean": guarded(count),
        }
        gradients, residual, sent, server, total, mean = (inside for _, inside in around.values())
        sent = sent.view(parts, -1)
        by.encode(codec, gradients, residual, residual, sent, 1.0, 1.0)
        by.add_and_encode(codec, sent, None, server, server, total, 1.0)
        by.add_and_encode(codec, sent, Own(gradients[part:], 1, 1.0), server, server, total, 1.0)
        by.decode(codec, sent, mean)
        for name, (whole, inside) in around.items():
            ends = torch.cat([whole[:guard], whole[-guard:]])
            assert (ends == 0x55 if whole.dtype == torch.uint8 else ends.isnan()).all(), name
            assert inside.isfinite().all(), name
        right = torch.empty(count)
        PLAIN.decode(codec, sent, right)
        assert torch.equal(mean, right)


def oracle_decode(codec, payload, elements):
    """Returns what the bytes of a payload mean, by their definition, in float64 and not rotated back."""
    raw = payload.numpy()
    codes = raw[: codec.code_bytes(elements)]
    scales = (raw[codec.code_bytes(elements) :].view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if codec.bits == 4:
        codes = np.stack([codes % 16, codes // 16], axis=1).reshape(-1)
    codes = codes.astype(np.float64)
    codes -= (codes >= 2 ** (codec.bits - 1)) * 2.0**codec.bits
    assert np.abs(codes).max() <= codec.levels
    return codes, codes * scales.repeat(codec.block)


def rotated(codec, x):
    return (x.reshape(-1, GROUP) @ hadamard(GROUP)).reshape(-1) if codec.rotated else x


def bound(codec, x):
    """Returns how far elements may be from decoded ones: half a level of their block, and rounding errors.

    A level is rounded up to bfloat16, by a 128th at most.
    """
    largest = np.abs(x).reshape(-1, codec.block).max(axis=1).repeat(codec.block)
    return largest * ((1 + 2**-7) / (2 * codec.levels + 1) + 16 * GROUP * 2.0**-24)


@FORMATS
@pytest.mark.parametrize("by", ["kernels", "codec.py"])
def test_codes_mean_the_gradients_within_half_a_level_and_residuals_are_what_they_miss(codec, by):
    by = PLAIN if by == "codec.py" else functions(codec, "cpu")
    parts, scale, unit = 3, 0.25, 8.0
    kinds = ["ordinary", "of many magnitudes", "one large", "ties"] * parts
    gradients, residual = made_of(kinds, codec, 3)
    results = exchange(by, codec, gradients, residual, parts, scale, unit)
    sent, missed, mean = (results[name] for name in ("sent", "missed", "mean"))
    elements = len(residual) // parts

    e = residual.double().numpy() * unit
    h = gradients.double().numpy() * scale + e
    t = rotated(codec, gradients.double().numpy() * scale + SENT * e)
    t_sent = np.concatenate([oracle_decode(codec, payload, elements)[1] for payload in sent])
    allowed = bound(codec, t)
    assert (np.abs(t_sent - t) <= allowed).all()
    assert (
        np.abs(mean.double().numpy() - rotated(codec, t_sent) / (GROUP if codec.rotated else 1)) <= allowed / 64
    ).all()
    assert (np.abs(mean.double().numpy() + missed.double().numpy() * unit - h) <= allowed / 64).all()

    server, t_parts = residual[:elements].double().numpy() / 16 * unit, t_sent.reshape(parts, -1)
    exact = rotated(codec, gradients[-elements:].double().numpy() * scale)  # which the last rank adds itself
    for name, added in (("", t_parts), ("own ", [*t_parts[:-1], exact])):
        h = np.sum(added, axis=0) + server
        t = h - (1 - SENT) * server
        t_total = oracle_decode(codec, results[f"{name}total"], elements)[1]
        allowed = bound(codec, t)
        assert (np.abs(t_total - t) <= allowed).all()
        missed = results[f"{name}server_missed"].double().numpy() * unit
        assert (np.abs(t_total + missed - h) <= allowed / 64).all()


@FORMATS
def test_a_fraction_of_the_residual_in_each_update_adds_little_noise_and_the_sum_is_exact(codec):
    by, generator = functions(codec, "cpu"), torch.Generator().manual_seed(5)
    blocks, updates, steady = 8, 400, 40
    gradients = torch.randn(updates, blocks * codec.block, generator=generator)
    residual, means = torch.zeros(blocks * codec.block), torch.empty_like(gradients)
    sent = torch.empty(1, codec.payload_bytes(len(residual)), dtype=torch.uint8)
    noise, missed = [], []
    for gradient, mean in zip(gradients, means, strict=True):
        t = gradient + SENT * residual
        by.encode(codec, gradient, residual, residual, sent, 1.0, 1.0)
        by.decode(codec, sent, mean)
        noise.append((mean - gradient).double().square().mean())
        missed.append((t - mean).double().square().mean())
    # Each noise is a rounding error minus a fraction of the residual of all earlier ones; see `SENT`. Squares of
    # neighbouring updates are correlated, over 2 / SENT updates at most.
    ratio = sum(noise[steady:]) / sum(missed[steady:])
    standard_error = (2 / (len(residual) * (updates - steady) * SENT / 2)) ** 0.5
    assert ratio == pytest.approx(1 + SENT / (2 - SENT), abs=5 * standard_error)
    exact, largest = gradients.double().sum(dim=0), gradients.abs().max()
    assert (means.double().sum(dim=0) + residual - exact).abs().max() < updates * 2**-22 * largest


@FORMATS
def test_blocks_without_gradients_or_below_the_threshold_send_nothing_and_lose_nothing(codec):
    kinds = ["only residual", "zeros", "subnormal", "ordinary"]
    gradients, residual = made_of(kinds, codec, 4)
    results = exchange(functions(codec, "cpu"), codec, gradients, residual, 1, 1.0, 4.0)
    silent = 3 * codec.block
    assert (results["mean"][:silent] == 0).all()
    assert (results["mean"][silent:] != 0).any()
    assert torch.equal(results["missed"][:silent], (gradients + residual * 4)[:silent] / 4)


def test_without_a_compiler_it_warns_once_and_codes_with_torch(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    codec = replace(CODECS["int8"], levels=126)  # which no test has compiled
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler found"):
        assert functions(codec, "cpu") == PLAIN
    assert functions(codec, "cpu") == PLAIN


def test_kernels_that_differ_from_codec_py_in_one_bit_are_not_used(monkeypatch):
    def inexact(codec, payloads, out):
        cpu_codec.decode(codec, payloads, out)
        out[1234] = torch.nextafter(out[1234], torch.tensor(torch.inf))

    monkeypatch.setattr(
        fused_codec, "_compiled", lambda device_type: functions(int8, "cpu")._replace(decode=inexact)
    )
    int8 = CODECS["int8"]
    with pytest.warns(RuntimeWarning, match="do not compute what their source does"):
        assert functions.__wrapped__(int8, "cpu") == PLAIN
