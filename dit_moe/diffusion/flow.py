"""The objective `flow`: predict the velocity of a path between data and noise at a random time (flow matching).

Which times a training step looks at is a choice of its own: their distribution, and a shift of it towards noise.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dit_moe.config import require
from dit_moe.diffusion.base import OBJECTIVES, Network, Objective, ObjectiveConfig, batch_mean, image_mean, predict
from dit_moe.diffusion.paths import PATHS, Level
from dit_moe.randomness import BatchRandom

T = TypeVar("T", float, Tensor)


@dataclass(frozen=True, kw_only=True)
class FlowConfig(ObjectiveConfig):
    """Flow matching (Lipman et al. 2023; SiT). Time 1 is noise, see `paths`."""

    path: Literal["linear", "gvp"] = "linear"
    time: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    """Of the logit of t, for time=logit_normal."""
    stratified: bool = False
    """Spread the times of the global batch evenly over their distribution, which lowers the variance of its mean loss
    (Kingma et al. 2021, "low-discrepancy sampler")."""
    time_shift: float | Literal["resolution"] = 1.0
    """Factor s of t' = s t / (1 + (s-1) t), or "resolution": s = √(C·H·W / base_dims), as the same noise destroys less
    of a larger image."""
    base_dims: int = 4096
    """Latent size at which time_shift=resolution shifts nothing; 4096 is 4 channels of 32 by 32."""
    time_scale: float = 1000.0
    """What t is multiplied by for the network, whose embedding resolves steps of about 1."""
    direction: Literal["to_noise", "to_data"] = "to_noise"
    """Where the network's time and velocity lead: to_data tells it 1 - t, and it predicts -v, as in SiT."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(predicted, true velocity) over the channels of each position (Yao et al. 2024, FasterDiT)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.time_mean), self, "time_mean", "must be finite")
        require(0 < self.time_std < math.inf, self, "time_std", "must be positive and finite")
        shifts = isinstance(self.time_shift, str) or 0 < self.time_shift < math.inf
        require(shifts, self, "time_shift", "must be positive and finite")
        require(self.base_dims > 0, self, "base_dims", "must be positive")
        require(0 < self.time_scale < math.inf, self, "time_scale", "must be positive and finite")
        require(0 <= self.cosine_weight < math.inf, self, "cosine_weight", "must be finite, not negative")


@OBJECTIVES.register("flow", FlowConfig)
class Flow(Objective):
    """The flow-matching objective; the network is told t·time_scale, fp32. Of 2C output channels the first C count."""

    name: ClassVar[str] = "flow"
    default_sampler: ClassVar[str] = "heun"
    learns_sigma = False

    def __init__(self, config: FlowConfig, num_classes: int) -> None:
        super().__init__(num_classes)
        self.config: FlowConfig = config
        self.path = PATHS[config.path]
        self.sign = 1 if config.direction == "to_noise" else -1  # of the network's velocity

    def network_time(self, t: T) -> T:
        """What the network is told at the time `t`."""
        return (t if self.sign > 0 else 1 - t) * self.config.time_scale

    def place(self, network_time: float) -> float:
        t = network_time / self.config.time_scale
        return t if self.sign > 0 else 1 - t

    def noisy_at(self, x0: Tensor, eps: Tensor, place: float) -> tuple[Tensor, Tensor]:
        t_B = torch.full((len(x0),), place, device=x0.device)
        return self.level(t_B, x0).noisy(x0, eps), self.network_time(t_B)

    def check(self, latent_shape: tuple[int, int, int]) -> None:
        useless = self.config.cosine_weight > 0 and latent_shape[0] == 1
        wanted = "is useless on latents of one channel, where a direction is only a sign; set it to 0"
        require(not useless, self.config, "cosine_weight", wanted)

    def __call__(self, model: Network, batch: Mapping[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        """See `Objective`. Scalars: "loss", "mse" and, if it has weight, "cosine"."""
        x0 = batch["latents"].float()
        t_B = self.draw_times(random, x0.shape[1:]).to(x0.device)
        eps = random.normal(*x0.shape[1:]).to(x0.device)
        labels_B = self.drop_labels(batch["labels"], random)
        level = self.level(t_B, x0)
        velocity = level.velocity(x0, eps)
        output = predict(model, level.noisy(x0, eps), self.network_time(t_B), labels_B, self.sign * velocity)
        return batch_mean(self.losses(output, velocity))

    def draw_times(self, random: BatchRandom, latent_shape: tuple[int, ...]) -> Tensor:
        """Times of one batch, [B] in [0, 1]."""
        config = self.config
        u_B = random.stratified() if config.stratified else random.uniform()
        t_B = u_B if config.time == "uniform" else logit_normal(u_B, config.time_mean, config.time_std)
        return shift_time(t_B, self.shift(latent_shape))

    def shift(self, latent_shape: tuple[int, ...]) -> float:
        """The factor of the time shift for latents [C,H,W]."""
        shift = self.config.time_shift
        return math.sqrt(math.prod(latent_shape) / self.config.base_dims) if shift == "resolution" else float(shift)

    def level(self, t_B: Tensor, like_BCHW: Tensor) -> Level:
        """The path at the times `t_B`, ready to be applied to images like `like_BCHW`."""
        return self.path(t_B).like_images(like_BCHW)

    def losses(self, output: Tensor, velocity: Tensor) -> dict[str, Tensor]:
        """Per-image terms [B]: "loss", "mse" and, if it has weight, "cosine"."""
        predicted = self.sign * output[:, : velocity.shape[1]].float()
        mse_B = image_mean((predicted - velocity) ** 2)
        if self.config.cosine_weight == 0:
            return {"loss": mse_B, "mse": mse_B}
        cosine_B = image_mean(1 - cosine_similarity(predicted, velocity, dim=1))
        return {"loss": mse_B + self.config.cosine_weight * cosine_B, "mse": mse_B, "cosine": cosine_B}


def logit_normal(u_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std·z) with z standard normal (Esser et al. 2024), from uniform draws through the normal
    quantile function, so that stratified draws stay stratified. A positive mean looks at noisier times."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u_B.double())).to(u_B.dtype)


def shift_time(t: Tensor, factor: float) -> Tensor:
    """t' = s t / (1 + (s-1) t): keeps 0 and 1, and s > 1 moves the times between towards noise (Esser et al. 2024)."""
    return factor * t / (factor * t + (1 - t))  # in this form 1 stays 1 also in floating point
