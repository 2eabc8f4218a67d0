"""`noise_form_validation.py`: what it makes of updates and gradients. The trainings take ten minutes."""

import math

import noise_form_validation
import pytest
import torch


def test_the_noise_scale_is_found_that_the_counted_updates_are_proportional_to():
    updates = {batch: 50 * (1 + 300 / batch) for batch in (8, 32, 128, 512)} | {1024: math.inf}
    assert noise_form_validation.counted(updates) == pytest.approx(300, rel=3e-3)  # the step of its grid


def test_the_exact_noise_scale_is_that_of_weighted_gradients():
    torch.manual_seed(0)
    gradients = torch.randn(50, 7, dtype=torch.float64) + 1
    weights = torch.rand(7, dtype=torch.float64)
    scaled = gradients * weights.sqrt()
    signal = scaled.mean(0).square().sum()
    expected = scaled.var(0, correction=0).sum() / signal
    split = ([part[:3], part[3:]] for part in (gradients.square().mean(0), gradients.mean(0), weights))
    assert noise_form_validation.noise_scale(*split) == pytest.approx(float(expected), rel=1e-9)
