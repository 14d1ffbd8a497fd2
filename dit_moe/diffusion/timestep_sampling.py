"""Where on [0, 1] a training step looks, and the time shift that moves its attention towards noise."""

# B rows of this micro-batch

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dit_moe.randomness import BatchRandom

Shift = float | Literal["resolution"]
"""A factor s, or "resolution": s follows from the size of the latents."""


def quantiles(random: BatchRandom, stratified: bool) -> Tensor:
    """Uniform draws [B]; stratified ones cover the global batch evenly, which lowers the variance of its mean loss
    (Kingma et al. 2021, "low-discrepancy sampler")."""
    return random.stratified() if stratified else random.uniform()


def uniform(u_B: Tensor) -> Tensor:
    return u_B


def logit_normal(u_B: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std·z) with z standard normal (Esser et al. 2024), through the normal quantile function, so
    that stratified draws stay stratified. A positive mean looks at noisier times."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u_B.double())).to(u_B.dtype)


def shift_time(t: Tensor, factor: float) -> Tensor:
    """t' = s t / (1 + (s-1) t): keeps 0 and 1, and s > 1 moves the times between towards noise (Esser et al. 2024)."""
    return factor * t / (factor * t + (1 - t))  # in this form 1 stays 1 also in floating point


def shift_factor(shift: Shift, latent_shape: Sequence[int], base_dims: int) -> float:
    """`shift` itself, or for "resolution" √(C·H·W / base_dims): the same noise destroys less of a larger image."""
    return math.sqrt(math.prod(latent_shape) / base_dims) if shift == "resolution" else float(shift)
