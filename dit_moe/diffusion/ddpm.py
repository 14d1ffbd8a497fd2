"""The objective `ddpm`: predict epsilon, v or x0 at a random discrete noise level, and optionally the variance too."""

# B batch, C channels, H height, W width, N levels

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.diffusion.base import (
    OBJECTIVES,
    Network,
    Objective,
    ObjectiveConfig,
    batch_mean,
    image_mean,
    like_images,
    predict,
)
from dit_moe.diffusion.paths import Level
from dit_moe.diffusion.schedules import BETAS, Schedule
from dit_moe.randomness import BatchRandom

PIXEL_BIN = 1 / 255  # half the distance between two of 256 grey values on [-1, 1]


@dataclass(frozen=True, kw_only=True)
class DDPMConfig(ObjectiveConfig):
    """Denoising diffusion (Ho et al. 2020), by default as in DiT."""

    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    variance: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range"
    schedule: Literal["linear", "cosine"] = "linear"
    timesteps: int = 1000
    min_snr_gamma: float | None = None
    """Cap of the loss weight on the scale of x0 (Hang et al. 2023 use 5); null weighs all levels alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.timesteps >= 2, self, "timesteps", "must be at least 2")
        ends_below_one = self.schedule != "linear" or self.timesteps > 20
        require(ends_below_one, self, "timesteps", "is too few for schedule=linear; use 21 or more, or schedule=cosine")
        gamma = self.min_snr_gamma
        require(gamma is None or 0 < gamma < math.inf, self, "min_snr_gamma", "must be positive, or null for none")


class Posterior(NamedTuple):
    """What the network believes about the step from level n to n-1: a Gaussian, and the x0 behind its mean."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


@OBJECTIVES.register("ddpm", DDPMConfig)
class DDPM(Objective):
    """The DDPM objective; the network is told the level n, int64 in [0, timesteps)."""

    name: ClassVar[str] = "ddpm"
    default_sampler: ClassVar[str] = "ddpm"

    def __init__(self, config: DDPMConfig, num_classes: int) -> None:
        super().__init__(num_classes)
        self.config: DDPMConfig = config
        self.learns_sigma = config.variance == "learned_range"
        self.schedule = Schedule(BETAS[config.schedule](config.timesteps))
        self._schedules: dict[torch.device, Schedule] = {}

    def place(self, network_time: float) -> float:
        return network_time / len(self.schedule)

    def noisy_at(self, x0: Tensor, eps: Tensor, place: float) -> tuple[Tensor, Tensor]:
        n = min(round(place * len(self.schedule)), len(self.schedule) - 1)
        n_B = torch.full((len(x0),), n, device=x0.device)
        return self.noisy(x0, eps, n_B), n_B

    def __call__(self, model: Network, batch: Mapping[str, Tensor], random: BatchRandom) -> dict[str, Tensor]:
        """See `Objective`. Scalars: "loss", "mse" (before min-SNR weights) and, with learned variance, "vb" in bits."""
        x0 = batch["latents"].float()
        n_B = random.integers(len(self.schedule)).to(x0.device)
        eps = random.normal(*x0.shape[1:]).to(x0.device)
        labels_B = self.drop_labels(batch["labels"], random)
        x = self.noisy(x0, eps, n_B)
        output = predict(model, x, n_B, labels_B, self.target(x0, eps, n_B))
        return batch_mean(self.losses(output, x0, eps, x, n_B))

    def noisy(self, x0: Tensor, eps: Tensor, n_B: Tensor) -> Tensor:
        """`x0` at the levels `n_B`, [B,C,H,W]."""
        return self._level(n_B, x0).noisy(x0, eps)

    def target(self, x0: Tensor, eps: Tensor, n_B: Tensor) -> Tensor:
        """What the network learns to predict, [B,C,H,W]."""
        if self.config.prediction == "v":
            return self._level(n_B, x0).velocity(x0, eps)
        return eps if self.config.prediction == "epsilon" else x0

    def losses(self, output: Tensor, x0: Tensor, eps: Tensor, x: Tensor, n_B: Tensor) -> dict[str, Tensor]:
        """Per-image terms [B]: "loss", "mse" and, with learned variance, "vb" (bits per dimension)."""
        prediction, _ = self.split(output, x)
        mse_B = image_mean((prediction - self.target(x0, eps, n_B)) ** 2)
        loss_B = self._weighted(mse_B, n_B)
        if not self.learns_sigma:
            return {"loss": loss_B, "mse": mse_B}
        vb_B = self._variational_bound(output, x0, x, n_B)
        return {"loss": loss_B + vb_B, "mse": mse_B, "vb": vb_B}

    def posterior(self, output: Tensor, x: Tensor, n_B: Tensor) -> Posterior:
        """The network's p(x_{n-1} | x_n) from its `output` at `x` and the levels `n_B`; all [B,C,H,W], no clipping."""
        prediction, range_ = self.split(output, x)
        level, schedule = self._level(n_B, x), self._schedule_on(x)
        if self.config.prediction == "epsilon":
            x0 = level.x0_from_eps(x, prediction)
        elif self.config.prediction == "v":
            x0 = level.x0_from_v(x, prediction)
        else:
            x0 = prediction
        small = like_images(schedule.posterior_log_variance[n_B], x)
        if range_ is not None:  # iDDPM Eq. 15: between the two extremes, in the log domain
            fraction = (range_ + 1) / 2
            log_variance = fraction * like_images(schedule.log_betas[n_B], x) + (1 - fraction) * small
        elif self.config.variance == "fixed_large":
            log_variance = like_images(schedule.large_log_variance[n_B], x).expand_as(x)
        else:
            log_variance = small.expand_as(x)
        return Posterior(self._posterior_mean(x0, x, n_B), log_variance, x0)

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and the variance channels if this objective learns them, in the dtype of `x`.

        Raises ValueError if the network has no such channels.
        """
        channels = x.shape[1]
        if self.learns_sigma and output.shape[1] != 2 * channels:
            raise ValueError(
                f"variance=learned_range needs {2 * channels} output channels, the network gives {output.shape[1]}; "
                "build it with learn_sigma=true, or choose variance=fixed_small"
            )
        output = output.to(x.dtype)
        return output[:, :channels], output[:, channels:] if self.learns_sigma else None

    def _weighted(self, mse_B: Tensor, n_B: Tensor) -> Tensor:
        """`mse_B` with min-SNR weights (Hang et al. 2023): min(SNR, gamma) on the error of x0, which is 1/SNR times the
        error of epsilon and 1/(SNR+1) times that of v."""
        if self.config.min_snr_gamma is None:
            return mse_B
        snr_B = self._schedule_on(mse_B).snr[n_B]
        errors = {"x0": torch.ones_like(snr_B), "epsilon": 1 / snr_B, "v": 1 / (snr_B + 1)}
        weight_B = snr_B.clamp(max=self.config.min_snr_gamma) * errors[self.config.prediction]
        return weight_B.to(mse_B.dtype) * mse_B

    def _variational_bound(self, output: Tensor, x0: Tensor, x: Tensor, n_B: Tensor) -> Tensor:
        """A term of the bound in bits per dimension, [B]; only the variance learns from it (mean detached, iDDPM)."""
        channels = x.shape[1]
        frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
        mean, log_variance, _ = self.posterior(frozen, x, n_B)
        true_mean = self._posterior_mean(x0, x, n_B)
        true_log_variance = like_images(self._schedule_on(x).posterior_log_variance[n_B], x)
        kl_B = image_mean(_normal_kl(true_mean, true_log_variance, mean, log_variance))
        nll_B = image_mean(_discretised_normal_nll(x0, mean, log_variance))
        return torch.where(n_B == 0, nll_B, kl_B) / math.log(2)

    def _posterior_mean(self, x0: Tensor, x: Tensor, n_B: Tensor) -> Tensor:
        schedule = self._schedule_on(x)
        of_x0, of_x = schedule.posterior_mean_x0[n_B], schedule.posterior_mean_xt[n_B]
        return like_images(of_x0, x) * x0 + like_images(of_x, x) * x

    def _level(self, n_B: Tensor, x: Tensor) -> Level:
        return self._schedule_on(x).level(n_B).like_images(x)

    def _schedule_on(self, x: Tensor) -> Schedule:
        """The schedule with its tables on the device of `x`, where looking up levels does not make the host wait."""
        if x.device not in self._schedules:
            self._schedules[x.device] = self.schedule.to(x.device)
        return self._schedules[x.device]


def _normal_kl(mean_p: Tensor, log_var_p: Tensor, mean_q: Tensor, log_var_q: Tensor) -> Tensor:
    """KL(p ‖ q) of normal distributions in nats, elementwise."""
    spread = torch.exp(log_var_p - log_var_q) + (mean_p - mean_q) ** 2 * torch.exp(-log_var_q)
    return 0.5 * (log_var_q - log_var_p + spread - 1)


def _discretised_normal_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the normal's mass in the grey-value bin around `x`, in nats; the outermost bins reach to infinity."""
    inverse_std = torch.exp(-0.5 * log_variance)
    below = _normal_cdf((x - PIXEL_BIN - mean) * inverse_std).where(x >= -0.999, 0.0)
    above = _normal_cdf((x + PIXEL_BIN - mean) * inverse_std).where(x <= 0.999, 1.0)
    return -(above - below).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal CDF (Page 1977), within 2e-4; the one that trained DiT's variances."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
