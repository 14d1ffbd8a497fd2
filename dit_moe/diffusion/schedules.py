"""Noise schedules over discrete levels (DDPM), in float64: the noise at each level, and the step down from it."""

# N levels of the training chain, K levels of a respaced one

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from dit_moe.diffusion.paths import Level, variance_preserving


def linear_betas(levels: int) -> Tensor:
    """Variances rising linearly from 1e-4 to 0.02 over 1000 levels (DDPM; DiT), [N].

    Another number of levels scales them so that the chain ends at about the same noise; below 21 levels the last
    one would exceed 1.
    """
    scale = 1000 / levels
    return torch.linspace(scale * 1e-4, scale * 0.02, levels, dtype=torch.float64)


def cosine_betas(levels: int) -> Tensor:
    """Squared-cosine alpha_bar with every beta capped at 0.999 (Nichol & Dhariwal 2021), [N].

    The cap keeps the last alpha_bar above zero, 2.4e-9 for 1000 levels: nothing divides by zero. But x0 from a
    predicted epsilon is then amplified 2e4-fold, so at few steps a `v` or `x0` prediction is the better companion.
    """
    t = torch.arange(levels + 1, dtype=torch.float64) / levels
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


class Schedule:
    """A chain of noise levels and the Gaussian posterior q(x_{n-1} | x_n, x0) of each step down it.

    All tensors are float64 [N], on the CPU unless moved. `timesteps` says which level of the *training* chain each
    level is, which is what the network is told: 0 … N-1 unless the chain was `respaced`.
    """

    def __init__(self, betas: Tensor, timesteps: Tensor | None = None) -> None:
        self.betas = betas
        self.timesteps = torch.arange(len(betas)) if timesteps is None else timesteps
        self.alphas_cumprod = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=betas.dtype), self.alphas_cumprod[:-1]])
        noise = 1 - self.alphas_cumprod
        # DDPM Eqs. 6-7: mean = posterior_mean_x0 · x0 + posterior_mean_xt · x_n
        self.posterior_mean_x0 = betas * before.sqrt() / noise
        self.posterior_mean_xt = (1 - before) * (1 - betas).sqrt() / noise
        posterior_variance = betas * (1 - before) / noise
        # The first posterior is a point; its log is clipped to the second's (Ho et al. 2020; DiT).
        first = posterior_variance[1:2]
        self.posterior_log_variance = torch.cat([first, posterior_variance[1:]]).log()
        self.large_log_variance = torch.cat([first, betas[1:]]).log()
        self.log_betas = betas.log()
        self.snr = self.alphas_cumprod / noise

    def __len__(self) -> int:
        return len(self.betas)

    def to(self, device: torch.device) -> Schedule:
        """A copy on another device, the same to the last bit."""
        moved = copy.copy(self)
        vars(moved).update({name: table.to(device) for name, table in vars(self).items()})
        return moved

    def level(self, n: Tensor) -> Level:
        """alpha, sigma and the angular derivatives at the levels `n` of this chain."""
        return variance_preserving(self.alphas_cumprod[n])

    def respaced(self, steps: int, cleanest: bool = True) -> Schedule:
        """The chain over `steps` of these levels, evenly spaced and rounded, the noisiest one included.

        With `cleanest` level 0 is the other end (iDDPM; DiT); without, the last step leaves from further up. Raises
        ValueError unless there are that many levels and at least 2 are wanted.
        """
        left_out = 0 if cleanest else 1
        most = len(self) - left_out
        if not 2 <= steps <= most:
            raise ValueError(f"the schedule has {len(self)} levels to choose from; take between 2 and {most}")
        kept = torch.linspace(0, len(self) - 1, steps + left_out, dtype=torch.float64).round().long()[left_out:]
        alphas_cumprod = self.alphas_cumprod[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return Schedule(1 - alphas_cumprod / before, self.timesteps[kept])
