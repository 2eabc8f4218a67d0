"""The scaling rules and the learning-rate schedule.

Hazards: a rule that changes what it should leave, a beta driven below 0, a jump where the warm-up ends, a rate of
0 at the first or last update, a warm-up longer than the run, float noise at a factor of 1, torch imported by the
command line before its arguments are checked.
"""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_adam.errors import UserError
from hvd_adam.schedule import DECAYS, SCALING_RULES, LearningRateSchedule, learning_rate, scale

BETAS = (0.9, 0.999)


def schedule(**changes):
    fields = {"peak": 0.8, "initial": 0.1, "warmup_steps": 10, "total_steps": 100, "milestones": (30, 60)}
    return LearningRateSchedule(**{**fields, **changes})


def test_linear_scales_only_the_rate():
    assert scale(8, "linear", lr=1e-3, betas=BETAS, eps=1e-8) == (8e-3, BETAS, 1e-8)


def test_none_changes_nothing():
    assert scale(8, "none", lr=1e-3, betas=BETAS, eps=1e-8) == (1e-3, BETAS, 1e-8)


def test_sqrt_scales_rate_betas_and_eps_as_malladi_et_al_do():
    lr, betas, eps = scale(4, "sqrt", lr=1e-3, betas=BETAS, eps=1e-8)
    # A few roundings of numbers near 1: 1e-15 absolute covers them.
    assert lr == pytest.approx(2e-3, rel=1e-15)
    assert betas == pytest.approx((0.6, 0.996), abs=1e-15)
    assert eps == pytest.approx(0.5e-8, rel=1e-15)


@given(
    rule=st.sampled_from(SCALING_RULES),
    lr=st.floats(1e-8, 10),
    betas=st.tuples(st.floats(0, 0.999999), st.floats(0, 0.999999)),
    eps=st.floats(0, 1e-3),
)
def test_a_factor_of_one_changes_no_bit(rule, lr, betas, eps):
    assert scale(1, rule, lr=lr, betas=betas, eps=eps) == (lr, betas, eps)


@given(first=st.floats(0.5, 2), second=st.floats(0.5, 2))
def test_sqrt_scaling_twice_is_scaling_by_the_product(first, second):
    once = scale(first * second, "sqrt", lr=1e-3, betas=BETAS, eps=1e-8)
    step = scale(first, "sqrt", lr=1e-3, betas=BETAS, eps=1e-8)
    twice = scale(second, "sqrt", lr=step.lr, betas=step.betas, eps=step.eps)
    # Each 1−β is off by some units of 2⁻⁵³ and then multiplied by at most 2.
    assert twice.betas == pytest.approx(once.betas, abs=1e-14)
    assert (twice.lr, twice.eps) == pytest.approx((once.lr, once.eps), rel=1e-14)


def test_sqrt_refuses_a_factor_that_drives_a_beta_below_zero_and_names_the_remedy():
    with pytest.raises(UserError) as refusal:
        scale(16, "sqrt", lr=1e-3, betas=BETAS, eps=1e-8)
    message = str(refusal.value)
    assert "beta1 = 0.9" in message and "16" in message and "\n" not in message
    assert "at most 10" in message and "at least 0.9375" in message and "linear" in message
    assert scale(10, "sqrt", lr=1e-3, betas=BETAS, eps=1e-8).betas[0] == pytest.approx(0, abs=1e-15)


def test_sqrt_names_the_second_beta_if_that_would_be_negative():
    with pytest.raises(UserError, match=r"beta2 = 0.5"):
        scale(4, "sqrt", lr=1e-3, betas=(0.99, 0.5), eps=1e-8)


def test_halflife_keeps_the_samples_after_which_the_second_moment_has_halved():
    lr, betas, eps = scale(16, "halflife", lr=1e-3, betas=BETAS, eps=1e-8)
    assert (lr, betas[0], eps) == (1e-3, 0.9, 1e-8)
    updates = [math.log(0.5) / math.log(beta) for beta in (BETAS[1], betas[1])]
    # log(β) of β near 1 has the relative error 2⁻⁵³ / (1 − β), here 1e-13.
    assert updates[0] == pytest.approx(16 * updates[1], rel=1e-12)


@given(factor=st.floats(1e-3, 1e6), beta=st.floats(0, 0.999999))
def test_halflife_leaves_every_beta_in_its_range(factor, beta):
    assert 0 <= scale(factor, "halflife", lr=1e-3, betas=(beta, beta), eps=1e-8).betas[1] < 1


@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan])
def test_a_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(UserError, match="positive"):
        scale(factor, "linear", lr=1e-3, betas=BETAS, eps=1e-8)


def test_an_unknown_rule_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'cubic'.*linear, sqrt, halflife, none"):
        scale(2, "cubic", lr=1e-3, betas=BETAS, eps=1e-8)


def test_warm_up_starts_at_the_unscaled_rate_and_ends_at_the_scaled_one():
    rates = [learning_rate(step, schedule()) for step in range(12)]
    assert rates[0] == 0.1 and rates[10] == 0.8 and rates[11] == 0.8
    assert rates[5] == pytest.approx(0.45, rel=1e-15)


def test_without_warm_up_the_first_rate_is_the_peak():
    assert learning_rate(0, schedule(warmup_steps=0)) == 0.8


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_goes_from_the_peak_to_zero_at_the_end_and_not_before(decay):
    rates = [learning_rate(step, schedule(decay=decay)) for step in range(10, 101)]
    assert rates[0] == 0.8 and rates[-1] == 0 and rates[-2] > 0
    assert rates == sorted(rates, reverse=True)
    assert rates[45] == pytest.approx(0.4, rel=1e-14)  # half way down, both are at half the peak


def test_step_decay_multiplies_at_each_milestone():
    rate = {step: learning_rate(step, schedule(decay="step")) for step in (29, 30, 59, 60)}
    assert rate[29] == 0.8 and rate[30] == rate[59] == 0.8 * 0.1
    assert rate[60] == pytest.approx(0.8 * 0.01, rel=1e-15)


@given(
    decay=st.sampled_from(DECAYS),
    warmup=st.floats(0.01, 200),
    peak=st.floats(0.01, 1),
    initial=st.floats(0, 1),
    total=st.integers(1, 200),
)
def test_the_rate_is_continuous_where_the_warm_up_ends(decay, warmup, peak, initial, total):
    plan = schedule(decay=decay, warmup_steps=warmup, peak=peak, initial=initial, total_steps=total)
    gap = 1e-6
    before, after = (learning_rate(warmup * (1 + sign * gap), plan) for sign in (-1, 1))
    at_milestone = decay == "step" and any(abs(m - warmup) <= warmup * gap for m in plan.milestones)
    past_the_end = warmup >= total * (1 - 2 * gap)
    # The slope of the warm-up is |peak − initial| / warmup, that of a decay at most π/2 · peak / (total − warmup).
    if not at_milestone and not (past_the_end and decay in ("cosine", "linear")):
        slope = abs(peak - initial) / warmup + 2 * peak / max(total - warmup, gap)
        assert abs(after - before) <= 2 * slope * warmup * gap + 1e-12


@given(
    decay=st.sampled_from(DECAYS),
    warmup=st.floats(0, 300),
    total=st.integers(1, 200),
    initial=st.floats(1e-6, 1),
    peak=st.floats(1e-6, 1),
)
def test_every_update_of_a_run_has_a_positive_rate_between_the_bounds(decay, warmup, total, initial, peak):
    plan = schedule(decay=decay, warmup_steps=warmup, total_steps=total, initial=initial, peak=peak)
    rates = [learning_rate(step, plan) for step in range(total)]
    assert all(0 < rate <= max(initial, peak) * (1 + 1e-15) for rate in rates)


def test_a_warm_up_longer_than_the_run_never_reaches_the_peak():
    plan = schedule(warmup_steps=200.5, decay="cosine")
    rates = [learning_rate(step, plan) for step in range(100)]
    assert rates == sorted(rates) and rates[0] == 0.1 and rates[-1] < 0.8


@pytest.mark.parametrize(
    "changes",
    [
        {"peak": -1.0},
        {"initial": math.nan},
        {"warmup_steps": -0.5},
        {"total_steps": 0},
        {"decay": "exponential"},
        {"decay": "step", "milestones": ()},
        {"milestones": (60, 30)},
        {"milestones": (0, 30)},
        {"factor": 0.0},
        {"factor": 1.5},
    ],
)
def test_a_schedule_out_of_range_is_refused_in_one_line(changes):
    with pytest.raises(UserError) as refusal:
        schedule(**changes)
    assert "\n" not in str(refusal.value)


def test_importing_it_loads_neither_torch_nor_numpy():
    program = "import sys, hvd_adam.schedule; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
