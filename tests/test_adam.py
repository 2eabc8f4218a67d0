"""The results of Adam: all implementations against the papers, PyTorch, and a float64 oracle.

Hazards covered:
- the oracle itself is wrong (hand-computed numbers, the formulas in plain Python floats, known properties);
- an option or a combination of options is applied in the wrong place or the wrong order;
- parameters of several groups, dtypes, layouts and step counts are mixed up when they are updated together;
- a parameter without a gradient is decayed, or its step count advances;
- an update writes into the gradient;
- a formula loses accuracy: every element is held to a running error bound;
- half precision is rounded more often than when it is stored;
- master weights drift from the parameters, or overwrite loaded values;
- stochastic rounding is biased, does not repeat, or changes infinities;
- torch.optim does the work.
"""

import math
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from helpers.adam_oracle import IMPLEMENTATIONS, Oracle, cases, oracles, sweep, unit_roundoff
from hypothesis import given

from hvd_adam.optim.adam import Adam
from hvd_adam.optim.reference import adam_update
from hvd_adam.optim.tensor_lists import CPU_CHUNK_ELEMENTS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def half_works_on_cpu():
    """Returns whether this PyTorch has float16 arithmetic on the CPU; older versions do not."""
    one = torch.ones(1, dtype=torch.float16)
    try:
        one.clone().addcdiv_(one, one.sqrt())
    except RuntimeError:
        return False
    return True


def parameter(values, dtype=torch.float64):
    return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


def run(optimizer, params, gradients):
    """Takes one step for each list of gradients; ``None`` is a parameter without one."""
    for step_gradients in gradients:
        for p, g in zip(params, step_gradients, strict=True):
            p.grad = None if g is None else g.to(p.dtype, copy=True)
        optimizer.step()


# --- the oracle against the paper, and properties -------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_steps_agree_with_numbers_computed_by_hand(implementation):
    p = parameter(1.0)
    optimizer = Adam([p], lr=0.1, betas=(0.9, 0.99), eps=0.5, implementation=implementation)
    run(optimizer, [p], [[torch.tensor(2.0, dtype=torch.float64)]])
    # m = 0.1*2, v = 0.01*4; both corrections undo the factors: 1 - 0.1 * 2 / (2 + 0.5)
    assert p.item() == pytest.approx(0.92, rel=1e-14)
    run(optimizer, [p], [[torch.tensor(-1.0, dtype=torch.float64)]])
    # m = 0.9*0.2 - 0.1 = 0.08, v = 0.99*0.04 + 0.01 = 0.0496; 1 - 0.9^2 = 0.19, 1 - 0.99^2 = 0.0199
    assert p.item() == pytest.approx(0.92 - 0.1 * (0.08 / 0.19) / (math.sqrt(0.0496 / 0.0199) + 0.5), rel=1e-14)
    assert optimizer.state[p]["exp_avg"].item() == pytest.approx(0.08, rel=1e-14)
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(0.0496, rel=1e-14)
    assert optimizer.state[p]["step"].item() == 2


def adam_in_plain_python(theta, gradients, alpha, beta1, beta2, epsilon, decay, decoupled, amsgrad, maximize):
    """Algorithm 1 of arXiv 1412.6980 on one number, with line 6 or 12 of algorithm 2 of arXiv 1711.05101."""
    m = v = v_max = 0.0
    for t, g in enumerate(gradients, start=1):
        g = -g if maximize else g
        if decoupled:
            theta -= alpha * decay * theta
        else:
            g += decay * theta
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = max(v_max, v)
        v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
        theta -= alpha * (m / (1 - beta1**t)) / (math.sqrt(v_hat) + epsilon)
    return theta


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
def test_oracle_equals_the_papers_formula_in_plain_python_floats(decay, decoupled, amsgrad, maximize):
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(20, generator=generator, dtype=torch.float64).tolist()
    gradients[10:] = [g * 1e-3 for g in gradients[10:]]  # so that the maximum is not the newest v
    expected = adam_in_plain_python(0.7, gradients, 0.02, 0.8, 0.95, 1e-6, decay, decoupled, amsgrad, maximize)
    theta, m, v = torch.tensor([[0.7], [0.0], [0.0]], dtype=torch.float64)
    v_max = torch.zeros_like(v) if amsgrad else None
    for t, g in enumerate(gradients, start=1):
        adam_update(
            *(theta, torch.tensor([g], dtype=torch.float64), m, v, v_max),
            **dict(t=t, alpha=0.02, beta1=0.8, beta2=0.95, epsilon=1e-6),
            **dict(lambda_=decay, decoupled=decoupled, maximize=maximize),
        )
    # Twenty steps of about twenty roundings of 1.1e-16 on a number of size 1.
    assert theta.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_step_without_epsilon_has_the_length_of_the_learning_rate(implementation):
    gradient = torch.tensor([3e-12, -5e7, 1.0, -1e-3], dtype=torch.float64)
    p = parameter(torch.zeros(4))
    optimizer = Adam([p], lr=0.25, eps=0.0, implementation=implementation)
    run(optimizer, [p], [[gradient]])
    # About ten roundings lie between g and g / sqrt(g^2).
    torch.testing.assert_close(p.data, -0.25 * gradient.sign(), rtol=10 * 2**-53, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("betas", [(0.9, 0.9), (0.9, 0.999), (0.0, 0.5)])
def test_step_length_obeys_the_cauchy_schwarz_bound(implementation, betas):
    generator = torch.Generator().manual_seed(2)
    bursts = (torch.rand(200, 50, generator=generator) < 0.02).double()
    gradients = torch.randn(200, 50, generator=generator, dtype=torch.float64) * (bursts + 1e-9)
    p = parameter(torch.zeros(50))
    optimizer = Adam([p], lr=0.01, betas=betas, eps=0.0, implementation=implementation)
    for t, gradient in enumerate(gradients, start=1):
        before = p.detach().clone()
        run(optimizer, [p], [[gradient]])
        # m_hat = sum a_k g_k and v_hat = sum b_k g_k^2 with weights that sum to 1, so that
        # |m_hat| <= sqrt(sum a_k^2 / b_k) sqrt(v_hat); with equal betas the factor is 1.
        ages = torch.arange(t, dtype=torch.float64)
        a = (1 - betas[0]) * betas[0] ** ages / (1 - betas[0] ** t)
        b = (1 - betas[1]) * betas[1] ** ages / (1 - betas[1] ** t)
        limit = 0.01 * (a**2 / b).sum().sqrt().item()
        assert (p.detach() - before).abs().max().item() <= limit * (1 + 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_amsgrad_divides_by_the_largest_second_moment_so_far(implementation):
    p = parameter([0.0])
    optimizer = Adam([p], betas=(0.0, 0.5), amsgrad=True, implementation=implementation)
    run(optimizer, [p], [[torch.tensor([4.0])], *[[torch.tensor([1e-3])]] * 20])
    state = optimizer.state[p]
    assert state["max_exp_avg_sq"].item() == 8.0  # 0.5 * 4**2
    assert state["exp_avg_sq"].item() < 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_maximize_equals_minimizing_with_negated_gradients(implementation, options):
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(7, generator=generator) for _ in range(10)]
    up, down = parameter(torch.ones(7), torch.float32), parameter(torch.ones(7), torch.float32)
    run(Adam([up], maximize=True, implementation=implementation, **options), [up], [[g] for g in gradients])
    run(Adam([down], implementation=implementation, **options), [down], [[-g] for g in gradients])
    assert torch.equal(up, down)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decoupled_decay_of_zero_gradients_shrinks_parameters_and_keeps_moments_zero(implementation):
    p = parameter([2.0, -4.0])
    optimizer = Adam(*([p], 0.5), weight_decay=0.25, decoupled_weight_decay=True, implementation=implementation)
    run(optimizer, [p], [[torch.zeros(2)]] * 2)
    assert torch.equal(p.data, torch.tensor([2.0, -4.0], dtype=torch.float64) * 0.875**2)
    assert not optimizer.state[p]["exp_avg"].any()
    assert not optimizer.state[p]["exp_avg_sq"].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_step_does_not_change_the_gradient(implementation, decoupled):
    gradient = torch.randn(5, generator=torch.Generator().manual_seed(4))
    p = parameter(torch.ones(5), torch.float32)
    p.grad = gradient.clone()
    options = dict(weight_decay=0.1, decoupled_weight_decay=decoupled, maximize=True, amsgrad=True)
    Adam([p], implementation=implementation, **options).step()
    assert torch.equal(p.grad, gradient)


# --- layouts, batches, mixtures ---------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_memory_layout_gives_the_results_of_the_contiguous_one(implementation):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    layouts = {
        "channels last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3).contiguous().transpose(0, 3),
        "every other element": base.repeat_interleave(2, dim=3)[..., ::2],
        "0-dim": base[0, 0, 0, 0].clone(),
        "empty": base[:0].clone(),
    }
    strided = [torch.nn.Parameter(values) for values in layouts.values()]
    plain = [parameter(values.contiguous()) for values in layouts.values()]
    optimizers = [Adam(params, implementation=implementation) for params in (strided, plain)]
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in plain]
        for optimizer, params in zip(optimizers, (strided, plain), strict=True):
            run(optimizer, params, [gradients])
    for p, q in zip(strided, plain, strict=True):
        # Vector and scalar code may fuse multiplications differently: about ten roundings in each step.
        torch.testing.assert_close(p.data, q.data, rtol=5 * 10 * 2**-53, atol=5 * 10 * 2**-53)
    assert optimizers[0].state[strided[0]]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_model_larger_than_one_chunk_equals_torch_foreach_bit_for_bit():
    generator = torch.Generator().manual_seed(6)
    limit = CPU_CHUNK_ELEMENTS
    sizes = (limit // 2, limit // 2 + 1, 3, limit + 5, 1)
    ours, theirs = ([parameter(torch.ones(n), torch.float32) for n in sizes] for _ in range(2))
    gradients = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(3)]
    run(Adam(ours), ours, gradients)
    run(torch.optim.Adam(theirs, foreach=True), theirs, gradients)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_of_several_dtypes_in_one_group_keep_state_in_their_own_dtype(implementation):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float32)
    together = [parameter(torch.ones(3), dtype) for dtype in dtypes]
    separate = [parameter(torch.ones(3), dtype) for dtype in dtypes]
    gradients = [[torch.tensor([0.5, -2.0, 1.0], dtype=dtype) for dtype in dtypes]] * 4
    optimizer = Adam(together, lr=0.1, implementation=implementation)
    run(optimizer, together, gradients)
    for i, p in enumerate(separate):
        run(Adam([p], lr=0.1, implementation=implementation), [p], [[step[i]] for step in gradients])
        assert torch.equal(p, together[i])
        assert optimizer.state[together[i]]["exp_avg"].dtype == p.dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameter_without_gradient_is_neither_decayed_nor_counted(implementation):
    used, unused = parameter([1.0]), parameter([1.0])
    optimizer = Adam([used, unused], weight_decay=0.5, implementation=implementation)
    run(optimizer, [used, unused], [[torch.ones(1), None]] * 3)
    assert unused.item() == 1.0
    assert optimizer.state[unused]["step"].item() == 0
    assert optimizer.state[used]["step"].item() == 3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_update_code_of_torch_optim_is_never_called(implementation, decoupled, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("update code of torch.optim was called")

    for module in map(import_module, ("torch.optim.adam", "torch.optim.adamw", "torch.optim._functional")):
        for name in vars(module).copy():
            if "adam" in name and callable(getattr(module, name)):
                monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "_fused_adam_", refuse)
    monkeypatch.setattr(torch, "_fused_adamw_", refuse)
    with pytest.raises(AssertionError, match="update code"):  # the patch works
        p = parameter([1.0])
        run(torch.optim.Adam([p]), [p], [[torch.ones(1)]])
    p = parameter([1.0])
    options = dict(weight_decay=0.1, decoupled_weight_decay=decoupled, amsgrad=True)
    run(Adam([p], implementation=implementation, **options), [p], [[torch.ones(1)]])
    assert p.item() < 1.0


# --- the sweep --------------------------------------------------------------------------------------------


def implementations(case):
    """Returns all implementations for every third case, since small fused steps are slow."""
    return IMPLEMENTATIONS if case.seed % 3 == 0 else ("reference", "foreach")


def run_all(case, dtype, steps, implementations):
    """Runs the implementations, torch's loop, torch's foreach (without a tensor lr) and the oracles."""
    makers = {name: lambda p, name=name: case.ours(p, name) for name in implementations}
    makers["torch"] = lambda p: case.theirs(p, foreach=False)
    if not case.lr_is_tensor:
        makers["torch foreach"] = lambda p: case.theirs(p, foreach=True)
    runs = {name: case.parameters(dtype) for name in makers}
    optimizers = {name: makers[name](runs[name]) for name in makers}
    exact = oracles(case, dtype)
    for gradients in case.gradients(dtype, steps):
        for name, params in runs.items():
            run(optimizers[name], params, [gradients])
        for oracle, g in zip(exact, gradients, strict=True):
            if g is not None:
                oracle.step(g.double())
    return runs, optimizers, exact


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_foreach_is_torch_foreach(runs, optimizers):
    if "torch foreach" not in runs:
        return
    ours, theirs = optimizers["foreach"], optimizers["torch foreach"]
    for p, q in zip(runs["foreach"], runs["torch foreach"], strict=True):
        assert same_bits(p.detach(), q.detach())
        for key, value in theirs.state.get(q, {}).items():
            assert same_bits(ours.state[p][key], value.to(ours.state[p][key].dtype)), key


@sweep(30)
@given(case=cases())
def test_100_steps_in_float64_agree_with_torch_and_the_oracle_to_1e_12(case):
    runs, optimizers, exact = run_all(case, torch.float64, 100, implementations(case))
    for i, oracle in enumerate(exact):
        # Rounding is relative to the largest theta so far and to the distance that theta can have moved. Each step
        # adds a few u of the first and, with v's error growing by 6u a step, some hundred u of lr.
        scale = oracle.largest + 100 * float(oracle.group["lr"])
        for name in implementations(case):
            ours = runs[name][i].detach()
            assert ((ours - runs["torch"][i].detach()).abs() <= 1e-12 * scale).all()
            assert ((ours - oracle.theta).abs() <= 1e-12 * scale).all()
    assert_foreach_is_torch_foreach(runs, optimizers)


@sweep(30)
@given(case=cases())
def test_100_steps_in_float32_stay_within_the_running_error_bound(case):
    runs, optimizers, exact = run_all(case, torch.float32, 100, implementations(case))
    for i, oracle in enumerate(exact):
        assert oracle.valid
        for name in implementations(case):
            ours = runs[name][i].detach().double()
            assert ((ours - oracle.theta).abs() <= oracle.e_theta).all()
            # Both are within the bound of the truth, so within twice the bound of each other.
            assert ((ours - runs["torch"][i].detach().double()).abs() <= 2 * oracle.e_theta).all()
    assert_foreach_is_torch_foreach(runs, optimizers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sweep(25)
@given(case=cases())
def test_100_steps_in_half_precision_equal_torch_foreach_bit_for_bit(dtype, case):
    if dtype == torch.float16 and not half_works_on_cpu():
        pytest.skip("this PyTorch has no float16 arithmetic on the CPU")
    runs, optimizers, _ = run_all(case, dtype, 100, ["foreach"])
    assert_foreach_is_torch_foreach(runs, optimizers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@sweep(40)
@given(case=cases())
def test_half_precision_stays_within_the_running_error_bound(dtype, case):
    if dtype == torch.float16 and not half_works_on_cpu():
        pytest.skip("this PyTorch has no float16 arithmetic on the CPU")
    # To first order the bound holds while v's error, 6u a step, is small: 4 steps of bfloat16 (u = 2^-8). In
    # float16 small second moments are subnormal; parameters for which that spoils the bound are left out.
    runs, _, exact = run_all(case, dtype, 4, implementations(case))
    # "fused" computes in float32, "reference" in float64, and both round once, when a result is stored.
    rounded_once = oracles(case, dtype, arithmetic=torch.float32)
    for gradients in case.gradients(dtype, 4):
        for oracle, g in zip(rounded_once, gradients, strict=True):
            if g is not None:
                oracle.step(g.double())
    for name in implementations(case):
        for p, oracle in zip(runs[name], exact if name == "foreach" else rounded_once, strict=True):
            if oracle.valid:
                # The second order adds less than as much again, since all relative errors are below 1/4.
                assert ((p.detach().double() - oracle.theta).abs() <= 2 * oracle.e_theta).all()


# --- half precision without loss ----------------------------------------------------------------------

HALF = (torch.bfloat16, torch.float16)
LOSSLESS = ("master_weights", "stochastic_rounding")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
def test_master_weights_stay_within_the_bound_of_float32_and_parameters_are_rounded_from_them(
    implementation, dtype, decoupled
):
    generator = torch.Generator().manual_seed(7)
    p = parameter(torch.randn(40, generator=generator), dtype)
    options = dict(lr=1e-3, weight_decay=0.1, amsgrad=True, decoupled_weight_decay=decoupled, master_weights=True)
    optimizer = Adam([p], implementation=implementation, **options)
    info = torch.finfo(torch.float32)
    oracle = Oracle(
        *(optimizer.param_groups[0], decoupled, p.detach().double()),
        *(unit_roundoff(torch.float32), info.smallest_normal * info.eps),
    )
    for _ in range(100):
        gradient = torch.randn(40, generator=generator).to(dtype)
        run(optimizer, [p], [[gradient]])
        oracle.step(gradient.double())
    state = optimizer.state[p]
    assert oracle.valid
    assert ((state["master_param"].double() - oracle.theta).abs() <= oracle.e_theta).all()
    assert torch.equal(p.detach(), state["master_param"].to(dtype))
    assert {name: t.dtype for name, t in state.items()} == dict.fromkeys(state, torch.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", LOSSLESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_options_for_half_precision_have_no_effect_on_wider_parameters(implementation, option, dtype):
    plain, with_option = (parameter([0.1, 0.2, 0.3], dtype) for _ in range(2))
    optimizers = [Adam([plain], implementation=implementation)]
    optimizers.append(Adam([with_option], implementation=implementation, **{option: True}))
    for p, optimizer in zip((plain, with_option), optimizers, strict=True):
        run(optimizer, [p], [[torch.tensor([1.0, -2.0, 3.0], dtype=dtype)]] * 3)
    assert torch.equal(plain, with_option)
    assert [{k: t.dtype for k, t in state.items()} for o in optimizers for state in o.state.values()] == [
        {"step": torch.float32, "exp_avg": dtype, "exp_avg_sq": dtype}
    ] * 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_value_loaded_into_a_parameter_is_not_overwritten_by_its_master(implementation):
    p = parameter([1.0, 2.0, 3.0], torch.bfloat16)
    optimizer = Adam([p], lr=2**-12, master_weights=True, implementation=implementation)
    run(optimizer, [p], [[torch.ones(3)]])
    with torch.no_grad():
        p[0] = 7.0  # as by load_state_dict, clamping or copying from another model
    run(optimizer, [p], [[torch.ones(3)]])
    assert p[0].item() == 7.0
    # Constant gradients move every element by the rate (1 / (1 + eps) is 1): once from 7, twice from 2 and 3.
    moved = torch.tensor([1, 2, 2]) * 2**-12
    master = optimizer.state[p]["master_param"]
    torch.testing.assert_close(master, torch.tensor([7.0, 2.0, 3.0]) - moved, rtol=2**-23, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stochastic_rounding_returns_a_neighbour_and_is_unbiased(implementation):
    n = 1 << 16
    p = parameter(torch.full((n,), 1.5), torch.bfloat16)
    optimizer = Adam([p], lr=0.3 * 2**-7, stochastic_rounding=True, implementation=implementation)
    run(optimizer, [p], [[torch.ones(n)]])
    exact, ulp = 1.5 - 0.3 * 2**-7, 2**-7
    assert set(p.tolist()) == {1.5 - ulp, 1.5}
    # Standard deviation of the mean of n draws with probability 0.3; arithmetic in float32 is off by a few 2^-24.
    sigma = ulp * math.sqrt(0.3 * 0.7 / n)
    assert abs(p.detach().double().mean().item() - exact) <= 6 * sigma + 10 * 2**-24


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_updates_too_small_for_nearest_rounding_are_kept_on_average(implementation):
    n, steps, lr = 4096, 100, 1e-4
    kept, lost = (parameter(torch.ones(n), torch.bfloat16) for _ in range(2))
    gradients = [[torch.ones(n)]] * steps
    run(Adam([kept], lr=lr, stochastic_rounding=True, implementation=implementation), [kept], gradients)
    run(Adam([lost], lr=lr, implementation=implementation), [lost], gradients)
    assert (lost == 1).all()
    # A move of lr between neighbours 2^-8 apart has a variance of at most lr * 2^-8; elements and steps are
    # independent. The moves themselves are lr but for roundings of the moments, some hundred 2^-24.
    sigma = math.sqrt(steps * lr * 2**-8 / n)
    assert abs(kept.detach().double().mean().item() - (1 - steps * lr)) <= 6 * sigma + steps * lr * 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("option", LOSSLESS)
def test_infinities_and_nan_are_kept_and_do_not_spread(implementation, option):
    p = parameter([math.inf, -math.inf, math.nan, 1.0], torch.bfloat16)
    optimizer = Adam([p], implementation=implementation, **{option: True})
    run(optimizer, [p], [[torch.zeros(4)]] * 3)
    assert p[:2].tolist() == [math.inf, -math.inf]
    assert p[2].isnan()
    assert p[3].item() == 1.0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stochastic_rounding_is_reproducible_and_differs_between_steps_and_elements(implementation):
    n, runs = 1000, []
    gradients = [[torch.ones(n)]] * 4
    for _ in range(2):
        p = parameter(torch.ones(n), torch.bfloat16)
        optimizer = Adam([p], lr=2**-9, stochastic_rounding=True, implementation=implementation)
        runs.append([])
        for gradient in gradients:
            run(optimizer, [p], [gradient])
            runs[-1].append(p.detach().clone())
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))
    moved = [(a != b).tolist() for a, b in pairwise(runs[0])]
    assert all(0 < sum(step) < n for step in moved)
    assert moved[0] != moved[1] != moved[2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_bits_of_stochastic_rounding_follow_the_order_of_memory(implementation):
    start = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    images = parameter(start, torch.bfloat16)
    images.data = images.data.to(memory_format=torch.channels_last)
    flat = parameter(start.permute(0, 2, 3, 1).reshape(-1), torch.bfloat16)
    for p in (images, flat):
        optimizer = Adam([p], lr=2**-9, stochastic_rounding=True, implementation=implementation)
        run(optimizer, [p], [[torch.ones(p.shape)]] * 3)
    assert torch.equal(images.permute(0, 2, 3, 1).reshape(-1), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", LOSSLESS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_options_for_half_precision_do_not_affect_other_dtypes(implementation, option, dtype):
    plain, marked = (parameter([1.0, -2.0], dtype) for _ in range(2))
    gradients = [[torch.tensor([0.5, 3.0])]] * 3
    run(Adam([plain], implementation=implementation), [plain], gradients)
    optimizer = Adam([marked], implementation=implementation, **{option: True})
    run(optimizer, [marked], gradients)
    assert torch.equal(plain, marked)
    assert set(optimizer.state[marked]) == {"step", "exp_avg", "exp_avg_sq"}
