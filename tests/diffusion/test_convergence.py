"""Samplers against a problem with a known solution: data of one normal distribution and its optimal network."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_moe.diffusion import OBJECTIVES, SAMPLERS, DDPMConfig, FlowConfig
from dit_moe.diffusion.samplers.chain import DDIMSamplerConfig, DDPMSamplerConfig, DPMSolverConfig
from dit_moe.diffusion.samplers.flow import EulerConfig, EulerMaruyamaConfig, HeunConfig, MidpointConfig

STEPS = [20, 40, 80]


def noise(images: int, side: int) -> Tensor:
    return torch.randn(images, 1, side, side, generator=torch.Generator().manual_seed(0))


def sample(gaussian, config, trained, z: Tensor) -> Tensor:
    labels = torch.zeros(len(z), dtype=torch.long)
    generators = [torch.Generator().manual_seed(1 + i) for i in range(len(z))]
    return SAMPLERS.build(config, trained)(gaussian.network(trained), z, labels, generators)


def orders(errors: list[float]) -> list[float]:
    """Observed orders of convergence when the steps double."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("time_shift", [1.0, 0.5])
@pytest.mark.parametrize(("config", "order"), [(EulerConfig, 1), (MidpointConfig, 2), (HeunConfig, 2)])
def test_ode_samplers_reach_the_solution_at_their_order(gaussian, config, order, path, time_shift) -> None:
    trained = OBJECTIVES.build(FlowConfig(path=path), num_classes=1)
    z = noise(1, 8).double()
    exact = gaussian.solution(z, trained.path(torch.ones((), dtype=torch.float64)))
    errors = [
        (sample(gaussian, config(steps=steps, time_shift=time_shift), trained, z) - exact).abs().max().item()
        for steps in STEPS
    ]
    assert errors[-1] < {1: 0.03, 2: 1e-3}[order]  # worst: 0.028 of Euler, 2.7e-4 of Heun
    # worst: 0.96 of 1, 1.90 of 2; midpoint reaches 3 on the linear path, by the symmetry of the problem
    assert min(orders(errors)) > order - 0.15


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_reaches_the_solution_at_order_one(gaussian, schedule: str, prediction: str) -> None:
    trained = OBJECTIVES.build(DDPMConfig(schedule=schedule, prediction=prediction), num_classes=1)
    z = noise(1, 8).double()
    exact = gaussian.solution(z, trained.schedule.level(torch.tensor(999)))
    errors = [(sample(gaussian, DDIMSamplerConfig(steps=k), trained, z) - exact).abs().max().item() for k in STEPS]
    assert errors[-1] < 0.06  # worst: 0.0575, on the linear schedule
    assert all(0.9 < order < 1.1 for order in orders(errors))  # 0.98 to 1.002


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_dpm_solver_of_higher_order_beats_ddim_at_equal_steps(gaussian, schedule: str, prediction: str) -> None:
    trained = OBJECTIVES.build(DDPMConfig(schedule=schedule, prediction=prediction), num_classes=1)
    z = noise(1, 8)
    exact = gaussian.solution(z, trained.schedule.level(torch.tensor(999)))

    def error(config) -> float:
        return (sample(gaussian, config, trained, z) - exact).abs().max().item()

    for steps in (20, 40):
        ddim = error(DDIMSamplerConfig(steps=steps))
        # worst: 0.49 for order 2 and 0.43 for order 3, at 20 steps of the linear schedule; 4 % apart for order 1
        assert error(DPMSolverConfig(steps=steps, order=2)) < 0.6 * ddim
        assert error(DPMSolverConfig(steps=steps, order=3)) < 0.6 * ddim
        assert error(DPMSolverConfig(steps=steps, order=1)) == pytest.approx(ddim, rel=0.1)  # the same, but for level 0


# 64 × 32 × 32 values: the standard error of their mean is 0.4 / 256 = 0.0016, of their relative deviation 0.0028
MEAN_ERROR, STD_ERROR = 0.0016, 0.0028


@pytest.mark.parametrize("diffusion", ["sigma", "constant"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_euler_maruyama_keeps_mean_and_deviation(gaussian, path: str, diffusion: str) -> None:
    trained = OBJECTIVES.build(FlowConfig(path=path), num_classes=1)
    config = EulerMaruyamaConfig(steps=160, diffusion=diffusion, last_step=1 / 160)
    samples = sample(gaussian, config, trained, noise(64, 32))
    # at 160 steps the method's own bias is about 0.002 in the mean and up to 0.8 % in the deviation
    assert samples.mean().item() == pytest.approx(gaussian.mean, abs=4 * MEAN_ERROR + 0.002)
    assert samples.std().item() == pytest.approx(gaussian.std, rel=4 * STD_ERROR + 0.008)


def test_euler_maruyama_loses_its_bias_at_order_one(gaussian) -> None:
    trained, z = OBJECTIVES.build(FlowConfig(), num_classes=1), noise(64, 32)
    bias = []
    for steps in (5, 10, 20):
        config = EulerMaruyamaConfig(steps=steps, diffusion_scale=0.5, last_step=1 / steps)
        bias.append(1 - sample(gaussian, config, trained, z).std().item() / gaussian.std)
    assert all(0.7 < order < 1.3 for order in orders(bias))  # 4 standard errors of the smallest bias, 3.4 %, are ±0.5


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_ancestral_sampling_keeps_mean_and_deviation(gaussian, variance: str) -> None:
    trained = OBJECTIVES.build(DDPMConfig(variance=variance), num_classes=1)
    samples = sample(gaussian, DDPMSamplerConfig(steps=250), trained, noise(64, 32))
    # 250 steps: the smaller variance comes out 2.9 % too narrow, the larger one 1.5 % too wide; the mean 0.0004 off
    assert samples.mean().item() == pytest.approx(gaussian.mean, abs=4 * MEAN_ERROR + 0.005)
    assert samples.std().item() == pytest.approx(gaussian.std, rel=0.05)


def test_stochastic_ddim_keeps_mean_and_deviation(gaussian) -> None:
    trained = OBJECTIVES.build(DDPMConfig(variance="fixed_small"), num_classes=1)
    samples = sample(gaussian, DDIMSamplerConfig(steps=250, eta=0.5), trained, noise(64, 32))
    # the deviation comes out 1.4 % too narrow, the mean 0.0003 off
    assert samples.mean().item() == pytest.approx(gaussian.mean, abs=4 * MEAN_ERROR + 0.005)
    assert samples.std().item() == pytest.approx(gaussian.std, rel=0.05)
