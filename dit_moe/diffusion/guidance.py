"""Classifier-free guidance (Ho & Salimans 2022): strengthen the label by extrapolating away from the null label."""

# B batch, C channels, H height, W width

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_moe.config import ConfigError, require
from dit_moe.diffusion.base import Network

ROUNDING = 1e-6  # of a time, which schedulers may keep in fp32: the end of an interval is in it


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How strongly, when and on which channels to guide."""

    scale: float = 1.0
    """1 is no guidance, 0 ignores the label."""
    interval: tuple[float, ...] = (0.0, 1.0)
    """First and last time of guidance, both included; t=1 is noise, a DDPM level n counts as n/N
    (Kynkäänniemi et al. 2024)."""
    channels: int | None = None
    """Guide only the first so many latent channels; null = all. Published DiT numbers used 3 of 4."""

    def __post_init__(self) -> None:
        require(0 <= self.scale < math.inf, self, "scale", "must be a finite number, not negative; 1 means no guidance")
        ordered = len(self.interval) == 2 and 0 <= self.interval[0] <= self.interval[1] <= 1
        require(ordered, self, "interval", "must be two times with 0 <= first <= last <= 1")
        require(self.channels is None or self.channels >= 1, self, "channels", "must be at least 1, or null for all")

    def active(self, time: float) -> bool:
        """Whether a step at this time is guided, which costs two evaluations an image instead of one."""
        return self.scale != 1 and self.interval[0] - ROUNDING <= time <= self.interval[1] + ROUNDING


class GuidedNetwork:
    """A network for a fixed batch of labels; conditional and null images go through it in one doubled batch."""

    def __init__(self, model: Network, labels_B: Tensor, null_label: int, config: GuidanceConfig) -> None:
        self.model, self.labels_B, self.config = model, labels_B, config
        self.null_B = torch.full_like(labels_B, null_label)

    def __call__(self, x: Tensor, network_time: float, time: float) -> Tensor:
        """The guided output at `x`, [B, C or 2C, H, W] in the dtype of `x`.

        Outside the guided channels (a learned variance among them) it is the conditional output. `network_time` is
        what the network is told (an int stays an int), `time` its place on [0, 1]. Raises ConfigError if `channels`
        exceeds C.
        """
        scale, channels = self.config.scale, self.config.channels or x.shape[1]
        if channels > x.shape[1]:
            raise ConfigError("channels", f"={channels} exceeds the {x.shape[1]} channels of the latents; lower it")
        time_dtype = torch.int64 if isinstance(network_time, int) else x.dtype
        t_B = torch.full((len(x),), network_time, dtype=time_dtype, device=x.device)
        if not self.config.active(time):
            return self.model(x, t_B, self.labels_B).to(x.dtype)
        output = self.model(x.repeat(2, 1, 1, 1), t_B.repeat(2), torch.cat([self.labels_B, self.null_B])).to(x.dtype)
        conditional, null = output.chunk(2)
        guided = null + scale * (conditional - null)
        return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
