"""The ddpm objective: targets, weights, the variational bound, label dropout."""

import pytest
import torch

from dit_moe.diffusion import DDPM, OBJECTIVES, DDPMConfig
from dit_moe.randomness import BatchRandom

PREDICTIONS = ["epsilon", "v", "x0"]


def build(**options) -> DDPM:
    return OBJECTIVES.build(DDPMConfig(**options), num_classes=10)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "latents": torch.rand(16, 3, 4, 4, generator=g) * 2 - 1,
        "labels": torch.randint(10, (16,), generator=g),
    }


def noise_like(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def perfect_prediction(objective: DDPM, x0: torch.Tensor, eps: torch.Tensor, n_B: torch.Tensor) -> torch.Tensor:
    velocity = objective.schedule.level(n_B).like_images(x0).velocity(x0, eps)
    return {"epsilon": eps, "v": velocity, "x0": x0}[objective.config.prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_perfect_prediction_recovers_x0_and_the_true_posterior(prediction: str, schedule: str, batch) -> None:
    objective = build(prediction=prediction, schedule=schedule, variance="fixed_small")
    x0, n_B = batch["latents"], torch.linspace(0, 960, 16).long()
    eps = noise_like(x0)
    x = objective.noisy(x0, eps, n_B)
    output = perfect_prediction(objective, x0, eps, n_B)
    posterior = objective.posterior(output, x, n_B)
    # fp32 rounding, amplified by 1/alpha <= 1/0.065
    torch.testing.assert_close(posterior.x0, x0, atol=2e-5, rtol=0)
    losses = objective.losses(output, x0, eps, x, n_B)
    assert losses["mse"].max() < 1e-12


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_vanishes_at_the_true_posterior_and_grows_away_from_it(prediction: str, batch) -> None:
    objective = build(prediction=prediction)
    x0, n_B = batch["latents"], torch.arange(1, 17) * 5  # higher up, the two extreme variances nearly coincide
    eps = noise_like(x0)
    x = objective.noisy(x0, eps, n_B)
    mean = perfect_prediction(objective, x0, eps, n_B)
    smallest, largest = (torch.cat([mean, torch.full_like(mean, v)], 1) for v in (-1.0, 1.0))
    at_truth = objective.losses(smallest, x0, eps, x, n_B)["vb"]
    assert at_truth.abs().max() < 1e-6
    assert (objective.losses(largest, x0, eps, x, n_B)["vb"] > at_truth).all()


def test_bound_at_level_zero_is_the_code_length_of_grey_values() -> None:
    """With a standard deviation far under a bin, the right grey value costs no bits and the next one many."""
    objective = build()
    x0 = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    n_B, eps = torch.zeros(3, dtype=torch.long), torch.zeros(3, 1, 1, 1)
    x = objective.noisy(x0, eps, n_B)
    narrow = torch.full_like(eps, -21.0)  # extrapolates to a standard deviation of 4e-4, a tenth of half a bin
    right, wrong = torch.cat([eps, narrow], 1), torch.cat([eps + 1, narrow], 1)  # wrong by 0.01 in x0
    assert objective.losses(right, x0, eps, x, n_B)["vb"].abs().max() < 1e-6
    # 1e-12 is the smallest probability; at the ends of the scale one side of the error is harmless
    assert objective.losses(wrong, x0, eps, x, n_B)["vb"].tolist() == pytest.approx([0, 39.86, 39.86], abs=0.01)


def test_bound_teaches_the_variance_but_not_the_mean(batch) -> None:
    objective = build()
    x0, n_B = batch["latents"], torch.arange(16) * 60
    eps = noise_like(x0)
    x = objective.noisy(x0, eps, n_B)
    output = torch.zeros(16, 6, 4, 4, requires_grad=True)
    objective.losses(output, x0, eps, x, n_B)["vb"].sum().backward()
    assert output.grad[:, :3].abs().max() == 0
    assert (output.grad[:, 3:] != 0).any()


def test_learned_log_variance_interpolates_between_the_extremes(batch) -> None:
    objective, x = build(), batch["latents"]
    n_B = torch.full((16,), 500)
    schedule = objective.schedule
    low, high = schedule.posterior_log_variance[500].item(), schedule.log_betas[500].item()
    for value, wanted in [(-1.0, low), (1.0, high), (0.0, (low + high) / 2)]:
        output = torch.cat([x, torch.full_like(x, value)], 1)
        assert objective.posterior(output, x, n_B).log_variance.unique().item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("variance", "wanted"), [("fixed_small", "posterior_log_variance"), ("fixed_large", "log_betas")]
)
def test_fixed_variances_are_the_extremes_and_add_no_bound(variance: str, wanted: str, batch) -> None:
    objective, x = build(variance=variance), batch["latents"]
    n_B = torch.full((16,), 500)
    log_variance = objective.posterior(x, x, n_B).log_variance
    assert log_variance.unique().item() == pytest.approx(getattr(objective.schedule, wanted)[500].item(), abs=1e-5)
    assert set(objective.losses(x, x, x, x, n_B)) == {"loss", "mse"}
    assert not objective.learns_sigma


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0_alike_for_every_prediction(prediction: str, batch) -> None:
    """The same wrong x0, expressed as epsilon, v or x0, must cost min(SNR, gamma) times its squared error."""
    objective = build(prediction=prediction, min_snr_gamma=5.0, variance="fixed_small")
    x0, n_B = batch["latents"], torch.linspace(1, 900, 16).long()
    eps = noise_like(x0)
    x, level = objective.noisy(x0, eps, n_B), objective.schedule.level(n_B).like_images(x0)
    wrong_x0 = x0 + 0.1
    wrong_eps = (x - level.alpha * wrong_x0) / level.sigma
    output = perfect_prediction(objective, wrong_x0, wrong_eps, n_B)
    wanted = objective.schedule.snr[n_B].clamp(max=5.0) * 0.1**2
    loss_B = objective.losses(output, x0, eps, x, n_B)["loss"]
    torch.testing.assert_close(loss_B.double(), wanted, rtol=1e-3, atol=0)  # eps at n=1 comes from an fp32 difference


def test_missing_variance_channels_are_named(batch) -> None:
    with pytest.raises(ValueError, match=r"needs 6 output channels, the network gives 3.*learn_sigma=true"):
        build()(lambda x, t, y: x, batch, BatchRandom(0, total=16))


@pytest.mark.parametrize(("schedule", "timesteps"), [("linear", 21), ("cosine", 2)])
def test_the_shortest_chains_work(schedule: str, timesteps: int, batch) -> None:
    objective = build(schedule=schedule, timesteps=timesteps)
    assert objective(lambda x, t, y: torch.cat([x, x], 1), batch, BatchRandom(0, total=16))["loss"].isfinite()


def test_network_is_told_whole_levels(batch) -> None:
    seen = []
    build()(lambda x, t, y: seen.append(t) or torch.cat([x, x], 1), batch, BatchRandom(0, total=16))
    assert seen[0].dtype == torch.int64
    assert seen[0].min() >= 0 and 500 < seen[0].max() < 1000
