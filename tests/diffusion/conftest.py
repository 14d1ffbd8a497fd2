"""A problem whose answer is known: data of one normal distribution, for which every optimal network has a formula."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit_moe.diffusion import DDPM, Flow, Network
from dit_moe.diffusion.paths import Level


@dataclass(frozen=True)
class Gaussian:
    """Independent dimensions N(mean, std²) as data, and the optimal networks for it."""

    mean: float = 0.7
    std: float = 0.4

    def at(self, level: Level) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noisy latents."""
        return level.alpha * self.mean, (level.alpha**2 * self.std**2 + level.sigma**2).sqrt()

    def guess(self, level: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x] and E[eps | x]."""
        mean, std = self.at(level)
        surprise = (x - mean) / std**2
        return self.mean + level.alpha * self.std**2 * surprise, level.sigma * surprise

    def network(self, objective: DDPM | Flow) -> Network:
        def flow(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            level = objective.level(t / objective.config.time_scale, x)
            return level.velocity(*self.guess(level, x))

        def ddpm(x: Tensor, n: Tensor, labels: Tensor) -> Tensor:
            level = objective.schedule.level(n).like_images(x)
            x0, eps = self.guess(level, x)
            prediction = {"x0": x0, "epsilon": eps, "v": level.velocity(x0, eps)}[objective.config.prediction]
            return torch.cat([prediction, -torch.ones_like(x)], 1) if objective.learns_sigma else prediction

        return flow if isinstance(objective, Flow) else ddpm

    def solution(self, noise: Tensor, start: Level) -> Tensor:
        """Where the probability-flow ODE takes `noise` from `start`: it keeps each point's distance in deviations."""
        mean, std = self.at(start)
        return self.mean + self.std * (noise - mean) / std


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()
