"""What every sampler promises, over the whole registry, and what is particular to some."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.diffusion import OBJECTIVES, SAMPLERS, DDPMConfig, FlowConfig, GuidanceConfig, SamplingError, check_fit
from dit_moe.diffusion.samplers.chain import DDIMSamplerConfig, DDPMSamplerConfig, DPMSolverConfig
from dit_moe.diffusion.samplers.flow import EulerConfig, EulerMaruyamaConfig, HeunConfig
from dit_moe.randomness import generator

SHAPE = (4, 4, 4)
everywhere = pytest.mark.parametrize("name", SAMPLERS.names())


def trained_with(objective: str, **options):
    return OBJECTIVES.build(OBJECTIVES.config_class(objective)(**options), num_classes=5)


def sampler_for(name: str, objective_options: dict | None = None, **options):
    config = SAMPLERS.config_class(name)(**{"steps": 6, **options})
    return SAMPLERS.build(config, trained_with(config.objective, **(objective_options or {})))


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Smooth, different for every time and label, and blind to other images; 2C channels."""
    told = (t.float() / 1000 + y).view(-1, 1, 1, 1)
    return torch.cat([torch.sin(x + told), 0.1 * torch.cos(x + told)], 1)


def noise(images: int) -> Tensor:
    return torch.stack([torch.randn(SHAPE, generator=generator(0, "noise", i)) for i in range(images)])


def generators(*images: int) -> list[torch.Generator]:
    return [generator(0, "steps", i) for i in images]


LABELS = torch.tensor([0, 3, 1, 4, 2, 0, 1])
GUIDED = GuidanceConfig(scale=2.0, interval=(0.2, 0.8))


@everywhere
@pytest.mark.parametrize("guidance", [GuidanceConfig(), GUIDED], ids=["plain", "guided"])
def test_an_image_is_the_same_alone_and_in_any_batch(name: str, guidance: GuidanceConfig) -> None:
    options = {"eta": 0.7} if name == "ddim" else {}
    sampler, z = sampler_for(name, **options), noise(7)
    together = sampler(network, z, LABELS, generators(*range(7)), guidance)
    for i in (0, 3, 6):
        alone = sampler(network, z[i : i + 1], LABELS[i : i + 1], generators(i), guidance)
        # sin and cos round differently in vector and scalar code
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    order = [4, 1, 6]
    mixed = sampler(network, z[order], LABELS[order], generators(*order), guidance)
    torch.testing.assert_close(mixed, together[order], atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("guidance", [GuidanceConfig(), GUIDED, GuidanceConfig(scale=3.0)], ids=repr)
def test_predicted_evaluations_are_those_made(name: str, guidance: GuidanceConfig) -> None:
    rows = []

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return network(x, t, y)

    sampler = sampler_for(name, steps=9)
    sampler(counting, noise(3), LABELS[:3], generators(0, 1, 2), guidance)
    assert sum(rows) == 3 * sampler.evaluations(guidance)
    assert len(rows) >= 9
    if guidance.interval == (0.0, 1.0):
        assert set(rows) == ({3} if guidance.scale == 1 else {6})
    else:
        assert set(rows) == {3, 6}


@everywhere
def test_states_are_fp32_and_without_gradient_when_the_network_answers_in_bf16(name: str) -> None:
    weight = torch.ones((), requires_grad=True)

    def low_precision(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return (network(x, t, y) * weight).bfloat16()

    latents = sampler_for(name)(low_precision, noise(2).bfloat16(), LABELS[:2], generators(0, 1), GUIDED)
    assert latents.dtype == torch.float32
    assert not latents.requires_grad


@everywhere
def test_progress_is_reported_after_every_step(name: str) -> None:
    calls: list[tuple[int, int]] = []
    sampler_for(name)(network, noise(1), LABELS[:1], generators(0), on_step=lambda *done: calls.append(done))
    assert calls == [(i, 6) for i in range(1, 7)]


@everywhere
def test_non_finite_latents_are_an_error_that_counts_them(name: str) -> None:
    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, t, y) * torch.where(y == 3, math.nan, 1.0).view(-1, 1, 1, 1)

    with pytest.raises(SamplingError, match=r"latents of image 1 \(and 0 more of 3\) are not finite"):
        sampler_for(name)(broken, noise(3), LABELS[:3], generators(0, 1, 2))


@everywhere
def test_other_objectives_networks_are_refused_with_the_samplers_that_fit(name: str) -> None:
    config = SAMPLERS.config_class(name)()
    for other in set(OBJECTIVES.names()) - {config.objective}:
        fitting = [name for name in SAMPLERS.names() if SAMPLERS.config_class(name).objective == other]
        with pytest.raises(ConfigError, match=f"choose one of {re.escape(', '.join(fitting))}$") as error:
            SAMPLERS.build(config, trained_with(other))
        assert error.value.path == "name"
    check_fit(config, config.objective)


@everywhere
def test_batches_of_unequal_sizes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="2 noises, 2 labels and 1 generators"):
        sampler_for(name)(network, noise(2), LABELS[:2], generators(0))


@pytest.mark.parametrize("name", ["ddpm", "euler_maruyama"])
def test_stochastic_samplers_depend_on_their_generators(name: str) -> None:
    sampler, z = sampler_for(name), noise(2)
    first = sampler(network, z, LABELS[:2], generators(0, 1))
    second = sampler(network, z, LABELS[:2], generators(0, 2))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


# ------------------------------------------------------------------------------------------------------------- ddpm


def test_ddim_with_eta_one_is_ancestral_sampling_with_the_small_variance() -> None:
    trained = {"variance": "fixed_small"}
    z, eta_one, ancestral = noise(2), sampler_for("ddim", trained, eta=1.0), sampler_for("ddpm", trained)
    samples = [sampler(network, z, LABELS[:2], generators(0, 1)) for sampler in (eta_one, ancestral)]
    torch.testing.assert_close(*samples, atol=1e-4, rtol=1e-4)  # fp32 in two orders; x0 at alpha = 1/157


@pytest.mark.parametrize("config", [DDPMSamplerConfig, DDIMSamplerConfig, DPMSolverConfig])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_every_step_count_of_a_nearly_noiseless_schedule_end_is_finite(config: type, prediction: str) -> None:
    """The cosine schedule ends at alpha_bar 2.4e-9; rounding must not make a variance negative there."""
    trained = OBJECTIVES.build(DDPMConfig(schedule="cosine", prediction=prediction), num_classes=5)
    for steps in (2, 3, 10, 97, 999):
        options = {"eta": 1.0} if config is DDIMSamplerConfig else {}
        sampler = SAMPLERS.build(config(steps=steps, **options), trained)
        assert sampler(network, noise(1), LABELS[:1], generators(0)).isfinite().all()


def test_networks_are_told_levels_of_the_training_chain() -> None:
    seen: dict[str, list[int]] = {"ddpm": [], "dpm++": []}
    for name, levels in seen.items():
        sampler = sampler_for(name, steps=4)
        sampler(lambda x, t, y, to=levels: to.append(t.item()) or network(x, t, y), noise(1), LABELS[:1], generators(0))
    assert seen == {"ddpm": [999, 666, 333, 0], "dpm++": [999, 749, 500, 250]}


def test_levels_count_as_n_over_N_for_the_guidance_interval() -> None:
    sampler = sampler_for("ddpm", steps=4)
    intervals = [GuidanceConfig(scale=2.0, interval=(0.333, 0.999)), GuidanceConfig(scale=2.0, interval=(0.3331, 1))]
    assert [sampler.evaluations(guidance) for guidance in intervals] == [4 + 3, 4 + 2]


def test_ancestral_sampling_needs_the_variance_it_was_promised() -> None:
    with pytest.raises(ValueError, match="needs 8 output channels, the network gives 4"):
        sampler_for("ddpm")(lambda x, t, y: x, noise(1), LABELS[:1], generators(0))


# ------------------------------------------------------------------------------------------------------------- flow


def times_seen(sampler, latent_shape: tuple[int, ...] = SHAPE) -> list[float]:
    seen: list[float] = []
    z = torch.zeros(1, *latent_shape)
    sampler(lambda x, t, y: seen.append(t.item() / 1000) or x, z, LABELS[:1], generators(0))
    return seen


def test_euler_walks_equal_steps_and_the_shift_moves_them_towards_noise() -> None:
    assert times_seen(sampler_for("euler", steps=4)) == pytest.approx([1, 0.75, 0.5, 0.25])
    shifted = [t * 2 / (1 + t) for t in (1, 0.75, 0.5, 0.25)]
    assert times_seen(sampler_for("euler", steps=4, time_shift=2.0)) == pytest.approx(shifted)
    assert times_seen(sampler_for("euler", {"time_shift": 2.0}, steps=4)) == pytest.approx(shifted)


def test_shift_by_resolution_reaches_the_sampler_and_its_evaluation_count() -> None:
    sampler = sampler_for("euler", {"time_shift": "resolution", "base_dims": 16}, steps=4)
    late = GuidanceConfig(scale=2.0, interval=(0.6, 1.0))
    assert times_seen(sampler) == pytest.approx([2 * t / (1 + t) for t in (1, 0.75, 0.5, 0.25)])
    assert sampler.evaluations(late, latent_shape=SHAPE) == 2 + 2 + 2 + 1  # at 1, 0.86, 0.67, 0.4
    assert sampler.evaluations(late, latent_shape=(1, 4, 4)) == 2 + 2 + 1 + 1  # at 1, 0.75, 0.5, 0.25
    with pytest.raises(ValueError, match="give the latent shape"):
        sampler.evaluations(late)


def test_heun_and_midpoint_look_twice_a_step() -> None:
    assert times_seen(sampler_for("heun", steps=2)) == pytest.approx([1, 0.5, 0.5, 0])
    assert times_seen(sampler_for("midpoint", steps=2)) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_euler_maruyama_keeps_a_short_last_step_for_the_ode() -> None:
    assert times_seen(sampler_for("euler_maruyama", steps=4)) == pytest.approx([1, 0.68, 0.36, 0.04])
    trained = OBJECTIVES.build(FlowConfig(), num_classes=5)
    one_step = [SAMPLERS.build(config(steps=1), trained) for config in (EulerMaruyamaConfig, EulerConfig)]
    assert torch.equal(*(sampler(network, noise(1), LABELS[:1], generators(0)) for sampler in one_step))


def test_euler_maruyama_without_diffusion_is_euler() -> None:
    trained, z = OBJECTIVES.build(FlowConfig(path="gvp"), num_classes=5), noise(2)
    still = EulerMaruyamaConfig(steps=5, diffusion_scale=0.0, last_step=0.2)
    both = [SAMPLERS.build(config, trained) for config in (still, EulerConfig(steps=5))]
    samples = [sampler(network, z, LABELS[:2], generators(0, 1)) for sampler in both]
    torch.testing.assert_close(*samples)


def test_heun_is_exact_on_straight_paths_in_one_step() -> None:
    trained = OBJECTIVES.build(FlowConfig(), num_classes=5)
    z = noise(1)
    latents = SAMPLERS.build(HeunConfig(steps=1), trained)(lambda x, t, y: z - 0.5, z, LABELS[:1], generators(0))
    torch.testing.assert_close(latents, torch.full_like(z, 0.5))
