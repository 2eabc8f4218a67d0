"""Formats that hold state in few bits: every code, every pattern of bfloat16, and the bounds of errors.

Hazards: a scale that overflows or vanishes; a root rounded to 0 under a first moment that is not; averages that
    stand still because each change is less than half a code; a code that changes although its value does not;
    kernels whose bits differ from the definition, with other threads or other vector registers; NaN that is
    lost.
"""

import copy
import math
import warnings

import pytest
import torch

from hvd_adam import Adam
from hvd_adam.optim import fused
from hvd_adam.optim.expression import KernelSpec
from hvd_adam.optim.formats import eight_bit, random_bits
from hvd_adam.optim.formats.correction import correction_of, decode_parameter, encode_parameter
from hvd_adam.optim.formats.expression import update_uncompiled
from hvd_adam.optim.kernels import cpu_kernel
from hvd_adam.optim.update_rows import hyper_parameters

BLOCK, LANES = random_bits.BLOCK, random_bits.LANES
U = 2.0**-24


def random_words(elements, seed=1):
    return random_bits.words(torch.tensor(seed, dtype=torch.int64), elements)


def every_bfloat16():
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)


def roundtrip_first(m, random=None):
    codes, scales = eight_bit.encode_exp_avg(m, random)
    return eight_bit.decode_exp_avg(codes, scales), eight_bit.spread(scales, m.numel()).double()


def roundtrip_root(root, random=None):
    codes, scales = eight_bit.encode_exp_avg_sq(root, random)
    decoded = eight_bit.decode_exp_avg_sq(codes, scales)
    return decoded.double().sqrt(), eight_bit.spread(scales, root.numel()).double()


def first_bound(m, scale):
    """Half the distance of two codes around m, and what float32 adds."""
    fine = m.double().abs() <= scale * eight_bit.KNEE / eight_bit.LEVELS
    return torch.where(fine, 1.0, 4.0) * scale / eight_bit.LEVELS / 2 + 2.0**-7 * scale / eight_bit.LEVELS


# --- the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2.0**-104, 1e-20, 1.0, 3.38e38])
def test_every_code_is_encoded_to_itself_with_any_random_bits(scale):
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat_interleave(LANES)
    scales = torch.full((eight_bit.scales_of(len(codes)),), scale, dtype=torch.bfloat16)
    for start in range(0, len(codes), BLOCK):  # the largest of each group fixes its scale
        codes[start : start + LANES] = -127 if start % (2 * BLOCK) else 127
    decoded = eight_bit.decode_exp_avg(codes, scales)
    for word in (None, torch.zeros(len(codes), dtype=torch.int64), torch.full((len(codes),), 2**32 - 1)):
        again, found = eight_bit.encode_exp_avg(decoded, word)
        assert torch.equal(again, codes)
        assert torch.equal(found, scales)
    roots = torch.arange(1, 256, dtype=torch.int32).to(torch.uint8).repeat_interleave(LANES)
    for start in range(0, len(roots), BLOCK):
        roots[start : start + LANES] = 255
    scale = min(scale, 1.8e19)
    scales = torch.full((eight_bit.scales_of(len(roots)),), scale, dtype=torch.bfloat16)
    decoded = eight_bit.decode_exp_avg_sq(roots, scales)
    if scale < 1e-16:  # squares below 2⁻¹²⁶ are not exact
        return
    for word in (None, torch.zeros(len(roots), dtype=torch.int64), torch.full((len(roots),), 2**32 - 1)):
        again, found = eight_bit.encode_exp_avg_sq(decoded.sqrt(), word)
        assert torch.equal(again, roots)
        assert torch.equal(found, scales)


def test_every_bfloat16_pattern_is_within_the_bound_in_a_group_of_its_own():
    """Each pattern is the only one of its group that is not 0, so it is the largest."""
    patterns = every_bfloat16()
    m = torch.zeros(len(patterns) // LANES, BLOCK // LANES, LANES)
    m[:, 0] = patterns.float().view(-1, LANES)
    m = m.view(-1)
    decoded, scale = roundtrip_first(m)
    finite = m.abs() <= torch.finfo(torch.bfloat16).max
    groups = finite.view(-1, BLOCK // LANES, LANES).all(dim=1, keepdim=True).expand(-1, BLOCK // LANES, LANES)
    groups = groups.reshape(-1)
    assert decoded[~groups].isnan().all()  # NaN, and infinities: the whole group
    error = (decoded.double() - m.double()).abs()[groups]
    assert (error <= first_bound(m, scale)[groups]).all()
    root = m.abs()
    finite = (root <= 2.0**64 * (1 - 2.0**-8)).view(-1, BLOCK // LANES, LANES).all(dim=1, keepdim=True)
    groups = finite.expand(-1, BLOCK // LANES, LANES).reshape(-1)
    decoded, scale = roundtrip_root(root)
    assert decoded[~groups].isnan().all()
    # A square may be subnormal, which is accurate to 2⁻¹⁴⁹.
    bound = torch.where(root < scale / 255, 1.0, 0.5) * scale / 255 * 1.01 + 2.0**-74
    assert ((decoded - root).abs() <= bound)[groups].all()


@pytest.mark.parametrize("magnitude", [1e-38, 1e-25, 1e-9, 1.0, 1e18])
@pytest.mark.parametrize("elements", [1, 15, 16, 17, 511, 512, 513, 5000])
def test_errors_stay_within_the_derived_bounds(magnitude, elements):
    generator = torch.Generator().manual_seed(elements)
    m = torch.randn(elements, generator=generator) * magnitude * torch.rand(elements, generator=generator) ** 4
    word = random_words(elements)
    decoded, scale = roundtrip_first(m)
    assert ((decoded.double() - m.double()).abs() <= first_bound(m, scale)).all()
    decoded, scale = roundtrip_first(m, word)
    assert ((decoded.double() - m.double()).abs() <= 2 * first_bound(m, scale) * 4).all()
    assert (scale >= m.double().abs()).all()
    for random, part in ((None, 0.5), (word, 1.0)):
        decoded, scale = roundtrip_root(m.abs(), random)
        bound = torch.where(m.abs() < scale / 255, 1.0, part) * scale / 255 * 1.01 + 2.0**-74
        assert ((decoded - m.double().abs()) <= bound).all()


def test_zeros_and_what_is_not_finite():
    zeros = torch.zeros(600)
    codes, scales = eight_bit.encode_exp_avg(zeros)
    assert not codes.any()
    assert not eight_bit.decode_exp_avg(codes, scales).any()
    assert not eight_bit.decode_exp_avg_sq(*eight_bit.encode_exp_avg_sq(zeros)).any()  # (2⁻¹⁰⁴/255)² is 0
    for bad in (math.nan, -math.nan, math.inf):
        m = torch.ones(600)
        m[3] = bad
        decoded, _ = roundtrip_first(m)
        lost = torch.arange(600) % LANES == 3
        lost[BLOCK:] = False
        assert torch.equal(decoded.isnan(), lost)
        codes, scales = eight_bit.encode_exp_avg_sq(m)
        assert torch.equal(eight_bit.decode_exp_avg_sq(codes, scales).isnan(), lost)
        assert not codes[lost].any()


def test_a_root_that_is_not_0_never_becomes_0():
    root = torch.full((BLOCK,), 1e-6)
    root[:LANES] = 1.0
    for random in (None, random_words(BLOCK)):
        decoded, scale = roundtrip_root(root, random)
        torch.testing.assert_close(decoded[LANES:], scale[LANES:] / 255, rtol=1e-6, atol=0)


def test_averages_of_both_moments_decay_though_each_step_is_less_than_half_a_code():
    """Rounding to nearest leaves both where they are for ever."""
    first, root = torch.full((BLOCK,), 0.01), torch.full((BLOCK,), 0.4)
    first[:LANES] = root[:LANES] = 1.0  # keep the scales
    steps = 1000
    for random in (False, True):
        m, r = first.clone(), root.clone()
        for step in range(steps):
            word = random_words(BLOCK, random_bits.rounding_seed(step, 0)) if random else None
            m, r = roundtrip_first(m * 0.9, word)[0], roundtrip_root(r * 0.9995, word)[0].float()
            m[:LANES] = r[:LANES] = 1.0
        if random:
            assert not m[LANES:].any()
            # 0.0005 · 102 codes a step, each by chance: a standard deviation of less than √(0.051 · 1000) codes.
            assert r[LANES:].mean() * 255 == pytest.approx(102 * 0.9995**steps, abs=1.5)
        else:
            assert m[LANES:].min() > 0.008
            assert r[LANES:].min() > 0.39


def test_random_words_are_uniform_and_differ_between_elements_steps_and_positions():
    words = torch.stack([random_words(4 * BLOCK, random_bits.rounding_seed(step, 0)) for step in range(200)])
    for shift, bits in ((0, 16), (10, 6), (20, 12), (2, 8)):
        noise = ((words >> shift) & (2**bits - 1)).double() / 2**bits + 0.5 / 2**bits
        # Standard deviation of a mean of n uniform numbers: √(1/12n).
        assert abs(noise.mean() - 0.5) < 5 / (12 * words.numel()) ** 0.5
        assert (noise.mean(dim=0) - 0.5).abs().max() < 6 / (12 * 200) ** 0.5
        assert (noise[1:] != noise[:-1]).double().mean() > 1 - 2.0 ** (1 - bits)
    shifted = random_words(3 * BLOCK, random_bits.rounding_seed(7, BLOCK))
    assert torch.equal(random_words(4 * BLOCK, random_bits.rounding_seed(7, 0))[BLOCK:], shifted)


# --- parameters with a correction ---------------------------------------------------------------------------


def test_every_parameter_and_correction_is_encoded_to_itself():
    for half in every_bfloat16().split(2**13):
        param = half.repeat_interleave(256)
        correction = torch.arange(-128, 128, dtype=torch.int8).repeat(len(half))
        x = decode_parameter(param, correction)
        valid = x.isfinite() & ~((param == 0) & (correction < 0))
        again, found = encode_parameter(x, torch.full((len(x),), 2**32 - 1))
        equal = (again.view(torch.int16) == param.view(torch.int16)) & (found == correction)
        assert equal[valid].all()
        assert torch.equal(x.isnan(), param.isnan())
        assert torch.equal(correction_of(param, x)[valid], correction[valid])


def test_corrected_parameters_are_within_2_to_the_minus_16_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator) * 10 ** (torch.rand(1 << 16, generator=generator) * 60 - 30)
    error = (decode_parameter(*encode_parameter(x)).double() - x.double()).abs() / x.abs().double()
    assert error.max() <= 2.0**-16
    assert torch.equal(encode_parameter(x)[0].float().sub(x).abs() <= x.abs() * 2.0**-8, torch.ones_like(x) > 0)
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in range(64):
        word = random_words(len(x), random_bits.rounding_seed(step, 0))
        total += (decode_parameter(*encode_parameter(x, word)).double() - x.double()) / x.abs().double()
    assert abs(total.mean() / 64) < 2.0**-16 * 5 / (64 * len(x)) ** 0.5 * 2


def test_parameters_that_are_not_finite_or_were_changed():
    x = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, 0.0, -0.0, 1e-45, -1e-40])
    param, correction = encode_parameter(x)
    decoded = decode_parameter(param, correction)
    assert decoded[2].isnan()
    assert torch.equal(decoded[[0, 1, 4, 5]], x[[0, 1, 4, 5]])
    torch.testing.assert_close(decoded[3:], x[3:], rtol=2.0**-15, atol=2.0**-141)
    pruned = decode_parameter(torch.zeros(256, dtype=torch.bfloat16), torch.arange(-128, 128, dtype=torch.int8))
    assert pruned.abs().max() < 2.0**-133


# --- kernels --------------------------------------------------------------------------------------------------

OPTIONS = (
    {"weight_decay": 0.0},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
)
SPECS = [
    KernelSpec("cpu", torch.float32, torch.float32, "nearest", "8bit"),
    KernelSpec("cpu", torch.float32, torch.bfloat16, "nearest", "bfloat16"),
    KernelSpec("cpu", torch.bfloat16, torch.float32, "correction", "8bit"),
    KernelSpec("cpu", torch.bfloat16, torch.float32, "correction"),
    KernelSpec("cpu", torch.bfloat16, torch.bfloat16, "stochastic", "bfloat16"),
    KernelSpec("cpu", torch.bfloat16, torch.float32, "master", "8bit"),
    KernelSpec("cpu", torch.float16, torch.float32, "master", "8bit"),
]


def made(spec, options, elements):
    """Returns groups, the table of one parameter, the parameter and its state."""
    groups, rows, states = fused._example(spec, elements)
    return [{**group, **options, "amsgrad": False} for group in groups], rows, states


@pytest.mark.slow
@pytest.mark.parametrize("portable", [False, True], ids=["native", "portable"])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_have_the_bits_of_the_definition_with_any_number_of_threads(spec, portable, monkeypatch):
    definitions = cpu_kernel._definitions
    if portable:
        monkeypatch.setattr(cpu_kernel, "_definitions", lambda spec: {**definitions(spec), "PORTABLE": 1})
    update = cpu_kernel.compile_kernel(spec).update
    threads = torch.get_num_threads()
    for options in OPTIONS:
        groups, rows, ours = made(spec, options, 1 << 17)
        _, _, expected = made(spec, options, 1 << 17)
        generator = torch.Generator().manual_seed(3)
        for step in range(1, 4):
            gradients = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in ours]
            for both in (ours, expected):
                for p, gradient in zip(both, gradients, strict=True):
                    p.grad = gradient.clone()
            torch.set_num_threads(step)
            update(rows.batch(), hyper_parameters(groups), torch.tensor(0.5))
            for (q, state), group in zip(expected.items(), groups, strict=True):
                flat = {name: t.view(-1) for name, t in state.items()}
                update_uncompiled(spec, q.detach().view(-1), q.grad.view(-1), flat, 0.5, group, step, 0)
        torch.set_num_threads(threads)
        for (p, state), (q, other) in zip(ours.items(), expected.items(), strict=True):
            assert torch.equal(p, q)
            for name in state.keys() - {"step"}:
                assert torch.equal(state[name], other[name]), name


# --- the optimizer --------------------------------------------------------------------------------------------

IMPLEMENTATIONS = ("reference", "foreach", "fused")
FORMATS = ("bfloat16", "8bit")


def trained(options, steps=5, dtype=torch.float32, load=None, first=1):
    """Returns parameters and their optimizer after some steps with gradients that depend on the step."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((70, 100), (300,), (2, 3, 40, 40), (5, 5))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = Adam(params, lr=1e-2, **options)
    if load is not None:
        for p, q in zip(params, load[0], strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(load[1])
    for step in range(first, first + steps):
        noise = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=noise))
        optimizer.step()
    return params, optimizer


def differences(params, others):
    return [(p.float() - q.float()).abs().max().item() for p, q in zip(params, others, strict=True)]


@pytest.mark.parametrize("state_format", FORMATS)
def test_implementations_agree_within_the_rounding_of_the_first_step(state_format):
    """Later steps differ where a last bit decides between two codes."""
    found = [trained({"state_format": state_format, "implementation": name}, 2)[0] for name in IMPLEMENTATIONS]
    for params in found[1:]:
        # A code's step of the moments of the first step moves the second one by up to 1/79, of a rate of 0.01.
        assert max(differences(params, found[0])) < 2e-4
    exact = trained({"implementation": "reference"}, 2)[0]
    assert 0 < max(differences(found[0], exact)) < 0.01  # a rate


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("state_format", FORMATS)
def test_state_has_few_bytes_where_tensors_are_large_and_float32_elsewhere(state_format, implementation):
    params, optimizer = trained({"state_format": state_format, "implementation": implementation})
    large = {"step", "exp_avg", "exp_avg_sq"}
    if state_format == "8bit":
        large = {"step", "exp_avg_codes", "exp_avg_scales", "exp_avg_sq_codes", "exp_avg_sq_scales"}
    for p in params:
        state = optimizer.state[p]
        if p.dim() > 1 and p.numel() >= 4096:
            assert set(state) == large
            held = sum(t.numel() * t.element_size() for name, t in state.items() if name != "step")
            assert held <= (4 if state_format == "bfloat16" else 2 + 1 / 8 + 64 / p.numel()) * p.numel()
        else:
            assert {t.dtype for t in state.values()} == {torch.float32}


@pytest.mark.parametrize("state_format", FORMATS)
def test_state_is_exchanged_with_torch_and_resumes_exactly_as_it_is_held(state_format):
    options = {"state_format": state_format, "implementation": "fused"}
    params, optimizer = trained(options, 3)
    stock = torch.optim.Adam(params, lr=1e-2)
    stock.load_state_dict(optimizer.state_dict())
    for p in params:
        assert stock.state[p]["exp_avg"].shape == p.shape
        assert stock.state[p]["exp_avg"].dtype == stock.state[p]["exp_avg_sq"].dtype == torch.float32
    held = optimizer.held_state_dict()
    whole, _ = trained(options, 5)
    resumed, again = trained(options, 2, load=(params, held), first=4)
    assert differences(whole, resumed) == [0.0] * 4
    for moment, bound in (("exp_avg", 1 / 79), ("exp_avg_sq", 1 / 20)):
        state = trained(options, 0, load=(params, stock.state_dict()))[1].state_dict()["state"]
        for i, entry in optimizer.state_dict()["state"].items():
            assert (state[i][moment] - entry[moment]).abs().max() <= bound * entry[moment].abs().max(), moment
    assert again.param_groups[0]["state_format"] == state_format


@pytest.mark.parametrize("before", ["float32", *FORMATS])
@pytest.mark.parametrize("after", ["float32", *FORMATS])
def test_a_state_that_is_held_in_one_format_continues_in_another(before, after):
    params, optimizer = trained({"state_format": before})
    found, other = trained({"state_format": after}, 3, load=(params, optimizer.held_state_dict()), first=6)
    names = set(other.state[found[0]])
    assert names == ({"step", "exp_avg", "exp_avg_sq"} if after != "8bit" else names - {"exp_avg", "exp_avg_sq"})
    assert other.state[found[0]]["step"] == 8
    expected, _ = trained({"state_format": "float32"}, 8)
    assert max(differences(found, expected)) < 0.01  # of 8 steps of 0.01


@pytest.mark.parametrize("name", ["exp_avg_scales", "exp_avg_sq_scales"])
def test_codes_without_their_scales_are_refused_before_anything_changes(name):
    _, optimizer = trained({"state_format": "8bit"})
    held, before = optimizer.held_state_dict(), optimizer.held_state_dict()
    number = next(i for i, entry in held["state"].items() if name in entry)
    del held["state"][number][name]
    with pytest.raises(ValueError, match=f"loaded state of parameter {number} is not Adam's: {name} is missing"):
        optimizer.load_state_dict(held)
    for i, entry in optimizer.held_state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][i][key]) for key, value in entry.items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"master_param": torch.zeros(3, 3)}, r"loaded master_param of parameter 0 has shape \(3, 3\), but the"),
        ({"master_param": torch.zeros(1, 64)}, r"loaded master_param of parameter 0 has shape \(1, 64\), but the"),
        ({"exp_avg_codes": None}, "loaded exp_avg_codes of parameter 0 must be a dense tensor, but is a NoneType"),
        ({"exp_avg": torch.zeros(64, 64)}, "loaded moments of parameter 0 have two formats"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(damage, message):
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adam([p], state_format="8bit", master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    held, before = (copy.deepcopy(optimizer.held_state_dict()) for _ in range(2))
    held["state"][0].update(damage)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(held)
    for name, value in optimizer.held_state_dict()["state"][0].items():
        assert torch.equal(value, before["state"][0][name])
    optimizer.step()


@pytest.mark.parametrize("state_format", ["8bit", "float32"])
@pytest.mark.parametrize("loads", [False, True])
def test_codes_follow_a_parameter_whose_order_in_memory_changes(loads, state_format):
    p = torch.nn.Parameter(torch.zeros(64, 64, 3, 3))
    optimizer = Adam([p], state_format="8bit")
    sizes = torch.logspace(-3, 1, 64).view(1, 64, 1, 1)  # of neighbours in memory with channels_last
    for seed in range(10):
        p.grad = torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(seed)) * sizes
        optimizer.step()
    before = optimizer.state_dict()["state"][0]
    if loads:
        q = torch.nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
        changed = Adam([q], state_format=state_format)
        changed.load_state_dict(optimizer.held_state_dict())
    else:
        p.data = p.data.to(memory_format=torch.channels_last)
        optimizer.param_groups[0]["state_format"] = state_format
        changed = optimizer
        p.grad = None
        changed.step()  # reads the state, and changes nothing
    found = changed.state_dict()["state"][0]
    bounds = {"exp_avg": 1 / 79, "exp_avg_sq": 1 / 20} if state_format == "8bit" else dict.fromkeys(before, 0.0)
    # Elements with one scale: 32 in the order of memory, a row of `LANES` apart.
    for moment in ("exp_avg", "exp_avg_sq"):
        groups = [
            t[moment].permute(0, 2, 3, 1).reshape(-1, BLOCK // LANES, LANES).transpose(1, 2)
            for t in (found, before)
        ]
        largest = groups[1].abs().amax(dim=-1, keepdim=True)
        assert ((groups[0] - groups[1]).abs() <= bounds[moment] * largest).all(), moment


@pytest.mark.parametrize("state_format", FORMATS)
def test_a_state_dict_of_decoded_moments_does_not_change_when_training_continues(state_format):
    params, optimizer = trained({"state_format": state_format})
    saved = optimizer.state_dict()["state"]
    before = copy.deepcopy(saved)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for i, entry in before.items():
        assert all(torch.equal(saved[i][name], value) for name, value in entry.items())


def test_a_format_that_is_changed_between_steps_is_converted():
    params, optimizer = trained({"state_format": "8bit"})
    optimizer.param_groups[0]["state_format"] = "float32"
    for p in params:
        p.grad = torch.zeros_like(p)
    expected = optimizer.state_dict()["state"][0]["exp_avg"] * 0.9
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["exp_avg"], expected)
    assert "exp_avg_codes" not in optimizer.state[params[0]]


def test_options_that_exclude_each_other_are_refused():
    p = torch.nn.Parameter(torch.ones(2))
    for options, message in (
        ({"state_format": "4bit"}, "state_format='4bit' is unknown, choose one of 'float32', 'bfloat16', '8bit'"),
        ({"state_format": "8bit", "amsgrad": True}, "state_format='8bit' and amsgrad exclude each other"),
        ({"master_weights": "4bit"}, "master_weights='4bit' is unknown"),
        ({"master_weights": "8bit", "stochastic_rounding": True}, "exclude each other"),
    ):
        with pytest.raises(ValueError, match=message):
            Adam([p], **options)
    stock = torch.optim.Adam([p], amsgrad=True)
    p.grad = torch.ones(2)
    stock.step()
    with pytest.raises(ValueError, match="amsgrad exclude each other"):
        Adam([p], state_format="8bit").load_state_dict(stock.state_dict())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "changed",
    [{"amsgrad": True}, {"state_format": "fp8"}, {"master_weights": "4bit"}, {"implementation": "triton"}],
)
def test_options_that_exclude_each_other_are_refused_when_a_loop_sets_them(changed, implementation):
    params, optimizer = trained({"state_format": "8bit", "implementation": implementation})
    before = [p.detach().clone() for p in params], copy.deepcopy(optimizer.held_state_dict()["state"])
    (group,) = optimizer.param_groups
    own = {name: group[name] for name in changed}
    group.update(changed)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"exclude each other|is unknown"):
            optimizer.step()
    after = [p.detach() for p in params], optimizer.held_state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    group.update(own)
    optimizer.step()
    assert not torch.equal(params[0], before[0][0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_8_bit_masters_hold_updates_that_bfloat16_loses(implementation):
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adam([p], lr=2.0**-14, master_weights="8bit", implementation=implementation, state_format="8bit")
    steps = 32  # all together half a unit in the last place of bfloat16 below 1
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state[p]
    assert state["param_correction"].dtype == torch.int8
    whole = optimizer.state_dict()["state"][0]["master_param"]
    assert whole.mean().item() == pytest.approx(1 - steps * 2.0**-14, abs=2.0**-15)
    assert whole.dtype == torch.float32
    assert (p.float() - whole).abs().max() <= 2.0**-8
    other = torch.nn.Parameter(p.detach().clone())
    again = Adam([other], master_weights=True)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["master_weights"] == "8bit"  # as saved
    assert torch.equal(again.state[other]["param_correction"], state["param_correction"])


def test_updates_that_rounding_loses_are_warned_of_once():
    def run(options, lr, dtype=torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(20, dtype=dtype))
        optimizer = Adam([p], lr=lr, **options)
        for _ in range(1000):
            p.grad = torch.ones_like(p)
            optimizer.step()

    with pytest.warns(
        RuntimeWarning, match=r"lr=0.001, updates of 1 parameters .*shape \(20,\).*bfloat16"
    ) as caught:
        run({}, 1e-3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"master_weights": True}, {"master_weights": "8bit"}, {"stochastic_rounding": True}):
            run(options, 1e-3)
        run({}, 1e-2)
        run({}, 1e-3, torch.float32)
