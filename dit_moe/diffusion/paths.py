"""The one convention of time, the paths from data to noise, and the conversions between what a network may predict.

Time t lies in [0, 1]; **t=0 is data, t=1 is noise** (eps, standard normal):

    x_t = alpha(t) x0 + sigma(t) eps,        v = dx_t/dt = alpha'(t) x0 + sigma'(t) eps.

Sampling runs from t=1 down to t=0. The discrete levels n = 0 … N-1 of DDPM count the same way and stand for t = n/N.
"""

# B batch, C channels, H height, W width; a level's four entries broadcast against [B,C,H,W]

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dit_moe.diffusion.base import like_images


class Level(NamedTuple):
    """A point of a path: x = alpha x0 + sigma eps, moving at the velocity v = d_alpha x0 + d_sigma eps.

    Conversions from v divide by the determinant d_alpha sigma - alpha d_sigma, a constant on both paths below, so they
    hold at every t; those that divide by alpha lose accuracy as t → 1, those that divide by sigma as t → 0.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def noisy(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.alpha * x0 + self.sigma * eps

    def velocity(self, x0: Tensor, eps: Tensor) -> Tensor:
        return self.d_alpha * x0 + self.d_sigma * eps

    def x0_from_eps(self, x: Tensor, eps: Tensor) -> Tensor:
        """Divides by alpha: undefined at t=1, where x is the noise whatever x0 was."""
        return (x - self.sigma * eps) / self.alpha

    def x0_from_v(self, x: Tensor, v: Tensor) -> Tensor:
        return (self.sigma * v - self.d_sigma * x) / self._determinant

    def eps_from_v(self, x: Tensor, v: Tensor) -> Tensor:
        return (self.d_alpha * x - self.alpha * v) / self._determinant

    def score_from_eps(self, eps: Tensor) -> Tensor:
        """∇ log p_t(x) = -E[eps | x] / sigma (Tweedie): grows without bound as t → 0."""
        return -eps / self.sigma

    @property
    def _determinant(self) -> Tensor:
        return self.d_alpha * self.sigma - self.alpha * self.d_sigma

    def like_images(self, x_BCHW: Tensor) -> Level:
        """A level with entries [B], brought to the shape [B,1,1,1], dtype and device that fit `x_BCHW`."""
        return Level(*(like_images(entry_B, x_BCHW) for entry_B in self))


def linear(t: Tensor) -> Level:
    """Straight lines at constant velocity eps - x0 (rectified flow, Liu et al. 2022; SiT "Linear")."""
    return Level(1 - t, t, -torch.ones_like(t), torch.ones_like(t))


def gvp(t: Tensor) -> Level:
    """Quarter circle, alpha² + sigma² = 1 (Albergo & Vanden-Eijnden 2022; SiT "GVP")."""
    angle = math.pi / 2 * t
    return Level(angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos())


PATHS: dict[str, Callable[[Tensor], Level]] = {"linear": linear, "gvp": gvp}


def variance_preserving(alpha_bar: Tensor) -> Level:
    """The level with alpha² = alpha_bar, sigma² = 1 - alpha_bar.

    A discrete level has no dt; its v is the derivative by the angle phi with alpha = cos phi, sigma = sin phi, that is
    v = alpha eps - sigma x0 (Salimans & Ho 2022).
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return Level(alpha, sigma, -sigma, alpha)
