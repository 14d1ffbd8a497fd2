"""Discrete noise schedules and their respacing."""

import pytest
import torch

from dit_moe.diffusion.schedules import BETAS, Schedule


@pytest.fixture(params=BETAS)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return Schedule(BETAS[request.param](1000))


def test_linear_betas_run_from_1e4_to_002() -> None:
    betas = BETAS["linear"](1000)
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    torch.testing.assert_close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))


def test_cosine_alpha_bar_is_a_squared_cosine_until_the_cap() -> None:
    schedule = Schedule(BETAS["cosine"](1000))
    angle = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
    squared = angle.cos() ** 2 / angle[0].cos() ** 2
    torch.testing.assert_close(schedule.alphas_cumprod[:-1], squared[1:-1], rtol=1e-9, atol=0)
    assert schedule.betas[-1] == 0.999


def test_no_level_is_pure_noise_so_that_everything_is_finite(schedule: Schedule) -> None:
    assert schedule.alphas_cumprod[-1] > 2e-9
    for name, values in vars(schedule).items():
        assert values.isfinite().all(), name


def test_snr_falls_with_the_level(schedule: Schedule) -> None:
    assert (schedule.snr.diff() < 0).all()
    level = schedule.level(torch.arange(1000))
    torch.testing.assert_close(schedule.snr, level.alpha**2 / level.sigma**2)


def test_posterior_is_the_product_of_the_two_gaussians_it_comes_from(schedule: Schedule) -> None:
    """q(x_{n-1} | x_n, x0) by completing the square of q(x_n | x_{n-1}) q(x_{n-1} | x0)."""
    n = torch.arange(1, 1000)
    beta, before = schedule.betas[n], schedule.alphas_cumprod[n - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    torch.testing.assert_close(schedule.posterior_log_variance[n].exp(), 1 / precision)
    torch.testing.assert_close(schedule.posterior_mean_x0[n], before.sqrt() / (1 - before) / precision)
    torch.testing.assert_close(schedule.posterior_mean_xt[n], (1 - beta).sqrt() / beta / precision)


def test_first_posterior_is_the_data_with_clipped_log_variance(schedule: Schedule) -> None:
    assert schedule.posterior_mean_x0[0].item() == pytest.approx(1)
    assert schedule.posterior_mean_xt[0] == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]


@pytest.mark.parametrize("cleanest", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 10, 250, 999])
def test_respaced_levels_keep_their_noise(schedule: Schedule, steps: int, cleanest: bool) -> None:
    respaced = schedule.respaced(steps, cleanest)
    assert len(respaced) == len(respaced.timesteps.unique()) == steps
    assert respaced.timesteps[-1] == 999
    assert (respaced.timesteps[0] == 0) == cleanest
    kept = schedule.alphas_cumprod[respaced.timesteps]
    # going through 1 - beta costs 1e-16 / 2.4e-9 at the last cosine level
    torch.testing.assert_close(respaced.alphas_cumprod, kept, rtol=1e-7, atol=0)


def test_respacing_to_all_levels_changes_nothing(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.respaced(1000).betas, schedule.betas, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("steps", "cleanest"), [(1, True), (0, False), (1001, True), (1000, False)])
def test_impossible_respacing_is_an_error(schedule: Schedule, steps: int, cleanest: bool) -> None:
    with pytest.raises(ValueError, match="take between 2 and"):
        schedule.respaced(steps, cleanest)
