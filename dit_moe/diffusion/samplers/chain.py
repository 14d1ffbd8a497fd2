"""Samplers for `ddpm` networks, each a walk down a respaced chain of levels, with the step rules of diffusers.

diffusers' schedulers disagree on which levels a given number of steps visits, and its DDIM assumes equal integer
strides when it looks up the next one. So each scheduler is given the respaced chain as its whole world: K levels, all
of them visited, so that the one below k is k-1 for every scheduler. Only the network is told the training level.

diffusers is imported where a scheduler is made, as that takes seconds, and reading a config needs none.
"""

# B batch, C channels, H height, W width, K levels of the respaced chain

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dit_moe.config import ConfigError, require
from dit_moe.diffusion.base import SAMPLERS
from dit_moe.diffusion.ddpm import DDPM
from dit_moe.diffusion.samplers.base import Evaluation, Generators, Sampler, SamplerConfig, Steps

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass(frozen=True, kw_only=True)
class ChainConfig(SamplerConfig):
    """`steps` levels of the training chain are visited, evenly spaced and rounded; from the last one on to the data."""

    objective: ClassVar[str] = "ddpm"

    def __post_init__(self) -> None:
        SamplerConfig.__post_init__(self)
        require(self.steps >= 2, self, "steps", "must be at least 2, the noisiest and the cleanest level")


@dataclass(frozen=True, kw_only=True)
class DDPMSamplerConfig(ChainConfig):
    """Ancestral sampling (Ho et al. 2020) with the variance the objective was trained for, learned or fixed."""


@dataclass(frozen=True, kw_only=True)
class DDIMSamplerConfig(ChainConfig):
    """DDIM (Song et al. 2021)."""

    steps: int = 50
    eta: float = 0.0
    """0 is deterministic, 1 as noisy as ancestral sampling with the smaller variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.eta <= 1, self, "eta", "must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig(ChainConfig):
    """DPM-Solver++, multistep (Lu et al. 2022). Order 1 is DDIM; the last step always is, and under 15 steps the one
    before it is at most of order 2."""

    steps: int = 20
    order: Literal[1, 2, 3] = 2


class ChainSampler(Sampler):
    """Visits the levels K-1 … 0 of the respaced chain; one evaluation each."""

    trained: DDPM
    visits_cleanest: ClassVar[bool] = True

    def __init__(self, config: ChainConfig, trained: DDPM) -> None:
        super().__init__(config, trained)
        try:
            self.schedule = trained.schedule.respaced(config.steps, self.visits_cleanest)
        except ValueError as error:
            raise ConfigError("steps", f"={config.steps} does not fit: {error}") from None
        self.scheduler_options = {
            "num_train_timesteps": config.steps,
            "trained_betas": self.schedule.betas.tolist(),
            "prediction_type": PREDICTION_TYPES[trained.config.prediction],
            "timestep_spacing": "trailing",  # K-1 … 0, in all three
        }

    def _steps(self, latent_shape: Sequence[int], generators: Generators) -> Iterator[Callable[[Tensor], Steps]]:
        scheduler = self._scheduler()
        # diffusers holds betas in fp32: at 10 steps of the cosine schedule that moves the last alpha_bar by 27 %
        scheduler.alphas_cumprod = self.schedule.alphas_cumprod
        scheduler.set_timesteps(len(self.schedule))

        def step(x: Tensor, k: int, time: float) -> Steps:
            output = yield Evaluation(x, int(self.schedule.timesteps[k]), time)
            return self._step(scheduler, output, k, x, generators)

        for k, time in zip(reversed(range(len(self.schedule))), self.times(), strict=True):
            yield partial(step, k=k, time=time)

    def times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        return [n / len(self.trained.schedule) for n in self.network_times()]

    def network_times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        return self.schedule.timesteps.flip(0).tolist()

    @abstractmethod
    def _scheduler(self) -> Any:
        """A fresh diffusers scheduler over the respaced chain (they hold state, so each call needs its own)."""

    @abstractmethod
    def _step(self, scheduler: Any, output: Tensor, k: int, x: Tensor, generators: Generators) -> Tensor:
        """From level k to k-1, or from 0 to the result."""


@SAMPLERS.register("ddpm", DDPMSamplerConfig)
class DDPMSampler(ChainSampler):
    """Draws noise in every step but the last."""

    def _scheduler(self) -> Any:
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        return DDPMScheduler(**self.scheduler_options, variance_type=self.trained.config.variance, clip_sample=False)

    def _step(self, scheduler: Any, output: Tensor, k: int, x: Tensor, generators: Generators) -> Tensor:
        parts = [part for part in self.trained.split(output, x) if part is not None]
        return scheduler.step(torch.cat(parts, dim=1), k, x, generator=generators, return_dict=False)[0]


@SAMPLERS.register("ddim", DDIMSamplerConfig)
class DDIMSampler(ChainSampler):
    """Draws noise in every step if eta > 0, though the last draw goes unused; a learned variance is ignored."""

    config: DDIMSamplerConfig

    def _scheduler(self) -> Any:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler(**self.scheduler_options, clip_sample=False)

    def _step(self, scheduler: Any, output: Tensor, k: int, x: Tensor, generators: Generators) -> Tensor:
        prediction = output[:, : x.shape[1]]
        return scheduler.step(prediction, k, x, eta=self.config.eta, generator=generators, return_dict=False)[0]


@SAMPLERS.register("dpm++", DPMSolverConfig)
class DPMSolverSampler(ChainSampler):
    """Deterministic; a learned variance is ignored.

    It skips level 0, as is customary: in log SNR the way there from the level above is so long that extrapolating over
    it made 20 steps of order 2 worse than DDIM's on problems with a known solution.
    """

    config: DPMSolverConfig
    visits_cleanest = False

    def _scheduler(self) -> Any:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**self.scheduler_options, solver_order=self.config.order)

    def _step(self, scheduler: Any, output: Tensor, k: int, x: Tensor, generators: Generators) -> Tensor:
        return scheduler.step(output[:, : x.shape[1]], k, x, return_dict=False)[0]
