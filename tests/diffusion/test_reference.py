"""The same numbers as the reference implementations, on their weights (see tests/golden)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_moe.diffusion import DDPM, OBJECTIVES, SAMPLERS, DDPMConfig, Flow, FlowConfig, GuidanceConfig
from dit_moe.diffusion.guidance import GuidedNetwork
from dit_moe.diffusion.samplers import chain
from dit_moe.diffusion.samplers.flow import EulerConfig, MidpointConfig
from dit_moe.models import MODELS, DiTConfig

Numbers = dict[str, Tensor]
ONCE = 1e-5  # largest relative error of one evaluation; measured: 1.5e-6 at most (vb), mostly 1e-7
WHOLE = 1e-3  # of a whole trajectory; measured: 4e-7 at most


def load(name: str) -> tuple[Numbers, Callable]:
    """The numbers of a golden file, and a network with its weights."""
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        numbers = {key: torch.from_numpy(file[key]) for key in file if key != "config"}
    shape = {"width": 48, "depth": 2, "heads": 3, "in_channels": 4, "input_size": 8, "num_classes": 7}
    model = MODELS.build(DiTConfig(name="DiT-custom/2", learn_sigma=True, **shape)).eval()
    model.load_state_dict({key[2:]: numbers.pop(key) for key in list(numbers) if key.startswith("w.")})
    return numbers, model.requires_grad_(False)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest value; values per image each on their own scale."""
    scale = wanted.abs() if wanted.ndim == 1 else wanted.abs().max()
    assert got.shape == wanted.shape
    assert ((got - wanted).abs() / scale).max().item() <= tolerance


# -------------------------------------------------------------------------------------------------------------- DiT


@pytest.fixture(scope="module")
def dit() -> tuple[Numbers, Callable]:
    return load("dit")


@pytest.fixture(scope="module")
def ddpm() -> DDPM:
    return OBJECTIVES.build(DDPMConfig(), num_classes=7)


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_respaced_timesteps_equal_dits(dit, ddpm: DDPM, steps: int) -> None:
    assert ddpm.schedule.respaced(steps).timesteps.tolist() == dit[0][f"timesteps_{steps}"].tolist()


def test_noisy_latents_equal_dits(dit, ddpm: DDPM) -> None:
    numbers, _ = dit
    assert_near(ddpm.noisy(numbers["ddpm_x0"], numbers["ddpm_noise"], numbers["t"]), numbers["ddpm_xt"], ONCE)


def test_loss_terms_equal_dits(dit, ddpm: DDPM) -> None:
    numbers, model = dit
    x, n_B = numbers["ddpm_xt"], numbers["t"]
    losses = ddpm.losses(model(x, n_B, numbers["y"]), numbers["ddpm_x0"], numbers["ddpm_noise"], x, n_B)
    for term in ("mse", "vb", "loss"):
        assert_near(losses[term], numbers[f"ddpm_{term}"], ONCE)


def test_posterior_equals_dits(dit, ddpm: DDPM) -> None:
    numbers, model = dit
    x, n_B = numbers["ddpm_xt"], numbers["t"]
    posterior = ddpm.posterior(model(x, n_B, numbers["y"]), x, n_B)
    for name, got in posterior._asdict().items():
        assert_near(got, numbers[f"p_{name}"], ONCE)


def test_guidance_on_three_channels_equals_dits(dit) -> None:
    numbers, model = dit
    config = GuidanceConfig(scale=float(numbers["cfg_scale"]), channels=3)
    network = GuidedNetwork(model, numbers["cfg_y"][:3], null_label=7, config=config)
    assert_near(network(numbers["cfg_x"][:3], 500, 0.5), numbers["cfg_out"][:3], ONCE)


def draw(sampler, model, numbers: Numbers) -> Tensor:
    z = numbers["sample_z"]
    return sampler(model, z, numbers["sample_y"], [torch.Generator() for _ in z])


def test_ancestral_samples_equal_dits(dit, ddpm: DDPM, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, model = dit
    noises = iter(numbers["sample_noises"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(noises))
    sampler = SAMPLERS.build(chain.DDPMSamplerConfig(steps=int(numbers["sample_steps"])), ddpm)
    assert_near(draw(sampler, model, numbers), numbers["sample_ddpm"], WHOLE)
    assert len(list(noises)) == 1  # the reference draws noise for the last step too, and does not use it


def test_ddim_samples_equal_dits(dit, ddpm: DDPM) -> None:
    numbers, model = dit
    sampler = SAMPLERS.build(chain.DDIMSamplerConfig(steps=int(numbers["sample_steps"])), ddpm)
    assert_near(draw(sampler, model, numbers), numbers["sample_ddim"], WHOLE)


def test_dpm_solver_of_order_one_on_the_same_levels_equals_dits_ddim(dit, ddpm: DDPM, monkeypatch) -> None:
    numbers, model = dit
    monkeypatch.setattr(chain.DPMSolverSampler, "visits_cleanest", True)
    sampler = SAMPLERS.build(chain.DPMSolverConfig(steps=int(numbers["sample_steps"]), order=1), ddpm)
    assert_near(draw(sampler, model, numbers), numbers["sample_ddim"], WHOLE)


# -------------------------------------------------------------------------------------------------------------- SiT


@pytest.fixture(scope="module")
def sit() -> tuple[Numbers, Callable]:
    return load("sit")


def flow(path: str) -> Flow:
    """SiT counts time from noise (0) to data (1) and so predicts data - noise."""
    return OBJECTIVES.build(FlowConfig(path=path.lower(), time_scale=1.0, direction="to_data"), num_classes=7)


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_path_and_loss_equal_sits(sit, path: str) -> None:
    numbers, network = sit
    objective, x0, eps, t_B = flow(path), numbers["data"], numbers["noise"], 1 - numbers["t"]
    level = objective.level(t_B, x0)
    x, velocity = level.noisy(x0, eps), level.velocity(x0, eps)
    assert_near(x, numbers[f"{path}_xt"], ONCE)
    assert_near(-velocity, numbers[f"{path}_ut"], ONCE)
    losses = objective.losses(network(x, objective.network_time(t_B), numbers["y"]), velocity)
    assert_near(losses["loss"], numbers[f"{path}_loss"], ONCE)


@pytest.mark.parametrize(("config", "name"), [(EulerConfig, "euler"), (MidpointConfig, "midpoint")])
def test_ode_samples_equal_sits(sit, config: type, name: str) -> None:
    numbers, network = sit
    sampler = SAMPLERS.build(config(steps=int(numbers["ode_points"]) - 1), flow("Linear"))
    z = numbers["ode_z"]
    latents = sampler(network, z, numbers["ode_y"], [torch.Generator() for _ in z])
    assert_near(latents, numbers[f"ode_{name}"], WHOLE)
