"""Samplers for `flow` networks: fixed-step solvers of the probability-flow ODE and of an SDE with its marginals."""

# B batch, C channels, H height, W width

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.diffusion.base import SAMPLERS
from dit_moe.diffusion.flow import Flow, shift_time
from dit_moe.diffusion.samplers.base import Evaluation, Generators, Sampler, SamplerConfig, Steps
from dit_moe.randomness import normal_like_images


@dataclass(frozen=True, kw_only=True)
class FlowSamplerConfig(SamplerConfig):
    """Steps of equal length from t=1 to t=0, before the time shift."""

    objective: ClassVar[str] = "flow"
    time_shift: float | Literal["as_trained"] = "as_trained"
    """Factor that spends more of the steps near the noise (> 1) or the data (< 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        shifts = isinstance(self.time_shift, str) or 0 < self.time_shift < math.inf
        require(shifts, self, "time_shift", "must be positive and finite")


@dataclass(frozen=True, kw_only=True)
class EulerConfig(FlowSamplerConfig):
    """First order, one evaluation a step."""


@dataclass(frozen=True, kw_only=True)
class MidpointConfig(FlowSamplerConfig):
    """Second order, two evaluations a step: the velocity of its middle."""

    steps: int = 125


@dataclass(frozen=True, kw_only=True)
class HeunConfig(FlowSamplerConfig):
    """Second order, two evaluations a step: the mean velocity of its ends."""

    steps: int = 125


@dataclass(frozen=True, kw_only=True)
class EulerMaruyamaConfig(FlowSamplerConfig):
    """Stochastic, one evaluation a step; the last step follows the ODE."""

    diffusion: Literal["sigma", "constant"] = "sigma"
    """D(t), half the variance of the noise put in per unit of time: sigma(t), as in the published runs of SiT and REPA,
    or 1, which takes more steps near the data."""
    diffusion_scale: float = 1.0
    """Factor of D."""
    last_step: float = 0.04
    """Length of the last step before the time shift, as in SiT; the others share the rest evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.diffusion_scale < math.inf, self, "diffusion_scale", "must be finite, not negative")
        require(0 < self.last_step < 1, self, "last_step", "must lie between 0 and 1; 1/steps makes all steps equal")


class FlowSampler(Sampler):
    """Walks a grid of times from 1 to 0."""

    config: FlowSamplerConfig
    trained: Flow

    def _grid(self) -> Tensor:
        """steps+1 times from 1 to 0 before the shift, float64."""
        return torch.linspace(1, 0, self.config.steps + 1, dtype=torch.float64)

    def shift(self, latent_shape: Sequence[int] | None) -> float:
        """The factor of the time shift for latents [C,H,W]."""
        factor = self.config.time_shift
        if not isinstance(factor, str):
            return factor
        if latent_shape is None and self.trained.config.time_shift == "resolution":
            raise ValueError("the time shift depends on the resolution; give the latent shape (C, H, W)")
        return self.trained.shift(tuple(latent_shape or ()))

    def _intervals(self, latent_shape: Sequence[int] | None) -> list[tuple[float, float]]:
        return list(pairwise(shift_time(self._grid(), self.shift(latent_shape)).tolist()))

    def _steps(self, latent_shape: Sequence[int], generators: Generators) -> Iterator[Callable[[Tensor], Steps]]:
        for start, end in self._intervals(latent_shape):
            yield partial(self._step, start=start, end=end, generators=generators)

    def _velocity(self, x: Tensor, t: float) -> Steps:
        """What the network says at `x` and the time `t`."""
        output = yield Evaluation(x, self.trained.network_time(t), t)
        return self.trained.sign * output[:, : x.shape[1]]

    def times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        return [time for start, end in self._intervals(latent_shape) for time in self._nodes(start, end)]

    def network_times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        return [self.trained.network_time(time) for time in self.times(latent_shape)]

    def _nodes(self, start: float, end: float) -> list[float]:
        """The times of one step's evaluations."""
        return [start]

    @abstractmethod
    def _step(self, x: Tensor, start: float, end: float, generators: Generators) -> Steps:
        """`x` at the time `end` from `x` at the time `start`."""


@SAMPLERS.register("euler", EulerConfig)
class EulerSampler(FlowSampler):
    """x + h v(x, t)."""

    def _step(self, x: Tensor, start: float, end: float, generators: Generators) -> Steps:
        v = yield from self._velocity(x, start)
        return x + (end - start) * v


class TwoStageSampler(FlowSampler):
    """The explicit Runge-Kutta methods of two stages and order 2, told apart by where the second stage looks."""

    second: ClassVar[float]
    """Fraction of the step."""

    def _nodes(self, start: float, end: float) -> list[float]:
        return [start, start + self.second * (end - start)]

    def _step(self, x: Tensor, start: float, end: float, generators: Generators) -> Steps:
        first_time, second_time = self._nodes(start, end)
        first = yield from self._velocity(x, first_time)
        second = yield from self._velocity(x + (second_time - first_time) * first, second_time)
        return x + (end - start) * (first + (second - first) / (2 * self.second))


@SAMPLERS.register("midpoint", MidpointConfig)
class MidpointSampler(TwoStageSampler):
    """Its second stage is half-way."""

    second = 0.5


@SAMPLERS.register("heun", HeunConfig)
class HeunSampler(TwoStageSampler):
    """Its second stage is at the end."""

    second = 1.0


@SAMPLERS.register("euler_maruyama", EulerMaruyamaConfig)
class EulerMaruyamaSampler(FlowSampler):
    """dx = (v - D ∇log p) dt + √(2D) dW̄, run from t=1 to 0: the marginals are the ODE's for any D(t) ≥ 0 (SiT).

    Draws noise in every step but the last, which is the ODE's (SiT takes the SDE's without its noise).
    """

    config: EulerMaruyamaConfig

    def _grid(self) -> Tensor:
        noisy = torch.linspace(1, self.config.last_step, self.config.steps, dtype=torch.float64)
        return torch.cat([noisy, torch.zeros(1, dtype=torch.float64)])

    def _step(self, x: Tensor, start: float, end: float, generators: Generators) -> Steps:
        v = yield from self._velocity(x, start)
        if end == 0:
            return x + (end - start) * v
        level = self.trained.path(torch.tensor(start, dtype=torch.float64))
        diffusion = self.config.diffusion_scale * (level.sigma if self.config.diffusion == "sigma" else 1.0)
        drift = v - diffusion * level.score_from_eps(level.eps_from_v(x, v))
        noise = normal_like_images(generators, x.shape[1:], x.device)
        return x + (end - start) * drift + (2 * diffusion * (start - end)) ** 0.5 * noise
