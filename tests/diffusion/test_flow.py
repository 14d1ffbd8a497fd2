"""The flow objective."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from dit_moe.config import ConfigError
from dit_moe.diffusion import OBJECTIVES, Flow, FlowConfig
from dit_moe.randomness import BatchRandom


def build(**options) -> Flow:
    return OBJECTIVES.build(FlowConfig(**options), num_classes=10)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(16, 3, 4, 4, generator=g), "labels": torch.randint(10, (16,), generator=g)}


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_true_velocity_has_no_loss_in_any_term(path: str, batch) -> None:
    objective = build(path=path, cosine_weight=0.5, label_dropout=0.0)
    wanted, x0 = {}, batch["latents"]

    def model(x, t, y):  # solves for the noise, knowing the data
        level = objective.level(t / 1000, x)
        wanted["v"] = level.velocity(x0, (x - level.alpha * x0) / level.sigma)
        return wanted["v"]

    losses = objective(model, batch, BatchRandom(0, total=16))
    assert set(losses) == {"loss", "mse", "cosine"}
    assert max(value.item() for value in losses.values()) < 1e-8  # fp32 division by sigma; drawn times are > 0.01


def test_network_is_told_scaled_times(batch) -> None:
    seen = []
    for scale in (1000.0, 1.0):
        build(time_scale=scale)(lambda x, t, y: seen.append(t) or x, batch, BatchRandom(0, total=16))
    torch.testing.assert_close(seen[0], seen[1] * 1000)
    assert seen[0].max() > 500


def test_time_shift_by_resolution_uses_the_latents_size(batch) -> None:
    plain, shifted = build(), build(time_shift="resolution", base_dims=12)
    t, t_shifted = (o.draw_times(BatchRandom(0, total=16), (3, 4, 4)) for o in (plain, shifted))
    torch.testing.assert_close(t_shifted, 2 * t / (1 + t))


def test_cosine_term_is_the_angle_between_velocities_over_channels() -> None:
    g = torch.Generator().manual_seed(0)
    predicted, velocity = torch.randn(2, 5, 3, 4, 4, generator=g)
    losses = build(cosine_weight=0.5).losses(predicted, velocity)
    cosine_B = (1 - cosine_similarity(predicted, velocity, dim=1)).mean((1, 2))
    torch.testing.assert_close(losses["cosine"], cosine_B)
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * cosine_B)
    torch.testing.assert_close(build(cosine_weight=1.0).losses(3 * velocity, velocity)["cosine"], torch.zeros(5))


def test_cosine_term_refuses_latents_of_one_channel() -> None:
    with pytest.raises(ConfigError, match=r"^cosine_weight=0.5 is useless on latents of one channel.*set it to 0"):
        build(cosine_weight=0.5).check((1, 8, 8))
    build(cosine_weight=0.5).check((4, 8, 8))
    build().check((1, 8, 8))
