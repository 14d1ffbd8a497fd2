"""Paths and conversions between x0, eps, v and score."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_moe.diffusion.paths import PATHS, Level, variance_preserving

values = st.floats(-5, 5)
inner_times = st.floats(0.02, 0.98)
TOLERANCE = {"atol": 1e-12, "rtol": 1e-12}  # float64


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
@given(t=inner_times, x0=values, eps=values)
def test_every_conversion_recovers_the_quantity_it_names(path: str, t: float, x0: float, eps: float) -> None:
    level, x0, eps = PATHS[path](double(t)), double(x0), double(eps)
    check_conversions(level, x0, eps)


@given(alpha_bar=st.floats(0.001, 0.999), x0=values, eps=values)
def test_conversions_hold_on_discrete_levels(alpha_bar: float, x0: float, eps: float) -> None:
    check_conversions(variance_preserving(double(alpha_bar)), double(x0), double(eps))


@given(alpha=st.floats(0.1, 3), sigma=st.floats(0.1, 3), d_alpha=st.floats(-3, -0.1), x0=values, eps=values)
def test_conversions_hold_for_any_path(alpha: float, sigma: float, d_alpha: float, x0: float, eps: float) -> None:
    check_conversions(Level(*map(double, (alpha, sigma, d_alpha, 1.0))), double(x0), double(eps))


def check_conversions(level: Level, x0: torch.Tensor, eps: torch.Tensor) -> None:
    x, v = level.noisy(x0, eps), level.velocity(x0, eps)
    for got, wanted in [
        (level.x0_from_eps(x, eps), x0),
        (level.x0_from_v(x, v), x0),
        (level.eps_from_v(x, v), eps),
        (-level.sigma * level.score_from_eps(eps), eps),
    ]:
        # dividing by alpha or sigma >= 0.02 and multiplying by pi/2 grows roundings of 1e-15 to 1e-13
        torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_time_zero_is_data_and_time_one_is_noise(path: str) -> None:
    x0, eps = double(2.0), double(-3.0)
    torch.testing.assert_close(PATHS[path](double(0.0)).noisy(x0, eps), x0, **TOLERANCE)
    torch.testing.assert_close(PATHS[path](double(1.0)).noisy(x0, eps), eps, **TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_conversions_from_velocity_hold_at_both_ends(path: str, t: float) -> None:
    level, x0, eps = PATHS[path](double(t)), double(2.0), double(-3.0)
    x, v = level.noisy(x0, eps), level.velocity(x0, eps)
    torch.testing.assert_close(level.x0_from_v(x, v), x0, **TOLERANCE)
    torch.testing.assert_close(level.eps_from_v(x, v), eps, **TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
@given(t=st.floats(0, 1))
def test_derivatives_are_those_of_alpha_and_sigma(path: str, t: float) -> None:
    time = double(t).requires_grad_()
    level = PATHS[path](time)
    for value, derivative in [(level.alpha, level.d_alpha), (level.sigma, level.d_sigma)]:
        torch.testing.assert_close(torch.autograd.grad(value, time, retain_graph=True)[0], derivative, **TOLERANCE)


def test_gvp_keeps_the_variance_and_linear_the_sum() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    gvp, linear = PATHS["gvp"](t), PATHS["linear"](t)
    torch.testing.assert_close(gvp.alpha**2 + gvp.sigma**2, torch.ones_like(t), **TOLERANCE)
    torch.testing.assert_close(linear.alpha + linear.sigma, torch.ones_like(t), **TOLERANCE)


def test_discrete_v_is_the_gvp_velocity_by_angle() -> None:
    t, x0, eps = double(0.3), double(2.0), double(-3.0)
    gvp = PATHS["gvp"](t)
    by_angle = variance_preserving(gvp.alpha**2).velocity(x0, eps)
    torch.testing.assert_close(by_angle * math.pi / 2, gvp.velocity(x0, eps), **TOLERANCE)
