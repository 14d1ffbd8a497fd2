"""What every sampler does around its own steps: checks, the guided network, progress, the final sanity check."""

# B batch, C channels, H height, W width

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_moe.config import ConfigError, WorkFailed, require
from dit_moe.diffusion.base import SAMPLERS, Network, Objective
from dit_moe.diffusion.guidance import GuidanceConfig, GuidedNetwork

Generators = list[torch.Generator]  # one per image


class Evaluation(NamedTuple):
    """A call of the network that a sampler asks for; the arguments of `GuidedNetwork`."""

    x: Tensor  # [B, C, H, W]
    network_time: float  # what the network is told; an int stays an int
    time: float  # its place in [0, 1], 1 being noise


Steps = Generator[Evaluation, Tensor, Tensor]
"""Yields evaluations, is sent the network's guided output at each, and returns the state that they lead to."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Options of every sampler."""

    objective: ClassVar[str]
    """The objective whose networks it can sample from."""
    steps: int = 250

    def __post_init__(self) -> None:
        require(self.steps >= 1, self, "steps", "must be at least 1")
        require(self.steps <= MOST_STEPS, self, "steps", f"must be at most {MOST_STEPS:,}")


def check_fit(config: SamplerConfig, objective: str) -> None:
    """ConfigError unless the sampler that `config` describes can sample what `objective` trains."""
    if config.objective != objective:
        fitting = [name for name in SAMPLERS.names() if SAMPLERS.config_class(name).objective == objective]  # type: ignore[attr-defined]
        needs = f"samples networks trained with {config.objective}, this one was trained with {objective}"
        raise ConfigError("name", f"={SAMPLERS.name_of(config)} {needs}; choose one of {', '.join(fitting)}")


MOST_STEPS = 1_000_000  # of a sampler


class SamplingError(WorkFailed):
    """Sampling went wrong on its way, on input that was fine."""


class Sampler(ABC):
    """Turns noise into latents in `config.steps` steps: build with a config and the objective that was trained."""

    def __init__(self, config: SamplerConfig, trained: Objective) -> None:
        check_fit(config, trained.name)
        self.config, self.trained = config, trained

    @torch.no_grad()
    def __call__(
        self,
        model: Network,
        noise_BCHW: Tensor,
        labels_B: Tensor,
        generators: Sequence[torch.Generator],
        guidance: GuidanceConfig = GuidanceConfig(),  # noqa: B008 (frozen)
        on_step: Callable[[int, int], Any] | None = None,
    ) -> Tensor:
        """Latents [B,C,H,W], at least fp32, from standard normal noise.

        Image i depends only on row i of noise and labels and on generators[i], a CPU generator from which every image
        takes the same number of draws. `on_step(done, steps)` is called after each step. Raises ValueError if the
        batch sizes differ, SamplingError if any latent ends up infinite or NaN.
        """
        if not len(noise_BCHW) == len(labels_B) == len(generators):
            sizes = f"{len(noise_BCHW)} noises, {len(labels_B)} labels and {len(generators)} generators"
            raise ValueError(f"{sizes}: give one of each per image")
        x = noise_BCHW.to(torch.promote_types(noise_BCHW.dtype, torch.float32))
        network = GuidedNetwork(model, labels_B, self.trained.null_label, guidance)
        for done, state in enumerate(self._states(network, x, list(generators)), start=1):
            x = state
            if on_step is not None:
                on_step(done, self.config.steps)
        broken = (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            raise SamplingError(
                f"latents of image {broken[0]} (and {len(broken) - 1} more of {len(x)}) are not finite after sampling; "
                "the network overflowed: check its weights, its precision and the guidance scale"
            )
        return x

    def evaluations(self, guidance: GuidanceConfig, latent_shape: Sequence[int] | None = None) -> int:
        """Network evaluations per image (NFE); a guided one counts as 2.

        `latent_shape` (C,H,W) is needed only where the time shift depends on it; ValueError if it is then missing.
        """
        return sum(2 if guidance.active(time) else 1 for time in self.times(latent_shape))

    @abstractmethod
    def times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        """Where in [0, 1] the network is evaluated, in order, 1 being noise. See `evaluations`."""

    def network_times(self, latent_shape: Sequence[int] | None = None) -> list[float]:
        """What the network is told at each of `times`; unless `_states` is overridden."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, generators: Generators) -> Steps:
        """All steps from noise `x`, for a caller that evaluates the network itself."""
        for step in self._steps(x.shape[1:], generators):
            x = yield from step(x)
        return x

    def _states(self, network: GuidedNetwork, x: Tensor, generators: Generators) -> Iterator[Tensor]:
        """The state after each step, the last one being the result."""
        for step in self._steps(x.shape[1:], generators):
            x = _run(step(x), network)
            yield x

    def _steps(self, latent_shape: Sequence[int], generators: Generators) -> Iterator[Callable[[Tensor], Steps]]:
        """One function for each step, which goes on from the state before it; unless `_states` is overridden."""
        raise NotImplementedError


def _run(step: Steps, network: GuidedNetwork) -> Tensor:
    """The state that a step leads to."""
    try:
        asked = next(step)
        while True:
            asked = step.send(network(*asked))
    except StopIteration as end:
        return end.value
