"""The PI controller that holds the mean number of active experts at its target by moving the threshold p.

It stands outside the graph and steps once per optimizer step. Its state is in persistent buffers, so a checkpoint and
an EMA copy carry it, and evaluation finds p frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit_moe.config import require

SMALLEST_U = 0.05  # steps and windows are sized relative to u, but to no less than this
MIN_SLOPE = 0.05  # in targets per unit of u: below it a threshold touches nobody, and the error is not divided by less
MIN_TAIL = 1e-6  # a p nearer to 1 than this is 1: every expert is active
DEFAULT_GAINS = {"scheduled": (0.2, 0.5), "paper": (0.1, 0.3)}  # (K_P, K_I), found as docs/controller.md tells


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Law, gains and bounds of the controller. docs/controller.md has the study that the defaults come from."""

    law: Literal["scheduled", "paper"] = "scheduled"
    kp: float | None = None  # proportional gain K_P; None: the default of the law
    ki: float | None = None  # integral gain K_I: how fast a wrong start, or a drifting router, is made up for
    p0: float | None = None  # threshold before the first step; None: solved on the first batch for the target
    p_min: float = 0.0
    p_max: float = 1.0

    def __post_init__(self) -> None:
        for name, default in zip(("kp", "ki"), DEFAULT_GAINS[self.law], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            require(getattr(self, name) >= 0, self, name, "must be at least 0")
        require(0 <= self.p_min <= self.p_max <= 1, self, "p_min", f"must lie between 0 and p_max={self.p_max} ≤ 1")
        inside = self.p0 is None or self.p_min <= self.p0 <= self.p_max
        require(inside, self, "p0", f"must lie in [{self.p_min}, {self.p_max}]")


class PIController(nn.Module):
    """u_{t+1} = u_0 + K_P·e_t + K_I·Σ_{s≤t} e_s, p = clip(p(u)): proportional and integral control. DTop-p, step 4.

    The law ``paper`` has u = p and e = (target − active) / experts. How much a step of p changes depends on the number
    of experts, on the target and on how sharp the router has become, by a factor of a hundred and more, so gains that
    are right for one model, or early in training, oscillate or crawl in another.

    The law ``scheduled`` counts the error in units of what it moves: e = (target − active) / slope, where the slope
    d active / d u is measured on the same tokens, so that 1/K_I is the number of steps in which any model makes up for
    an error. u = −ln(1 − p), the logarithm of the mass left out, keeps the slope steady near p = 1; e is cut to ±u, so
    that a threshold far from anybody's reach moves by its own size.

    Integration stops while p sits at a bound and the error pushes further out (anti-windup).
    """

    p: Tensor
    p0: Tensor
    error_sum: Tensor

    def __init__(self, config: ControllerConfig, target: float, experts: int) -> None:
        super().__init__()
        self.config, self.target, self.experts = config, target, experts
        p0 = (config.p_min + config.p_max) / 2 if config.p0 is None else config.p0
        # fp32 in every copy: in bf16 the threshold would move in steps of 0.004.
        self.register_buffer("p", torch.tensor(p0, dtype=torch.float32))
        self.register_buffer("p0", torch.tensor(p0, dtype=torch.float32))
        self.register_buffer("error_sum", torch.tensor(0.0, dtype=torch.float64))

    @torch.no_grad()
    def step(self, active: Tensor, slope: Tensor) -> None:
        """Move p after a step that used `active` experts a token on average.

        Args:
            active: scalar, reduced over all ranks.
            slope: scalar, how fast `active` grows with u, likewise (the law ``paper`` ignores it).
        """
        c = self.config
        assert c.kp is not None and c.ki is not None
        error = self._error(active.to(torch.float64), slope.to(torch.float64), self._to_u(self.p.to(torch.float64)))
        candidate = self.error_sum + error
        p = self._to_p(self._to_u(self.p0.to(torch.float64)) + c.kp * error + c.ki * candidate)
        outward = ((p >= c.p_max) & (error > 0)) | ((p <= c.p_min) & (error < 0))
        self.error_sum.copy_(torch.where(outward, self.error_sum, candidate))
        self.p.copy_(p.clamp(c.p_min, c.p_max))

    def _error(self, active: Tensor, slope: Tensor, u: Tensor) -> Tensor:
        if self.config.law == "paper":
            return (self.target - active) / self.experts
        most = u.clamp(min=SMALLEST_U)
        return ((self.target - active) / slope.clamp(min=MIN_SLOPE * self.target)).clamp(-most, most)

    def _to_u(self, p: Tensor) -> Tensor:
        return p if self.config.law == "paper" else -torch.log1p(-p.clamp(max=1 - MIN_TAIL))

    def _to_p(self, u: Tensor) -> Tensor:
        if self.config.law == "paper":
            return u
        p = -torch.expm1(-u)
        return torch.where(p >= 1 - MIN_TAIL, torch.ones_like(p), p)

    def slope(self, left_NE: Tensor) -> Tensor:
        """How fast the number of pairs grows with u at the threshold, from those that stand near it (see `mass_left`).

        A sum over the tokens, so that layers, micro-batches and ranks add up.
        """
        tail = 1 - self.p
        window = (-tail.clamp(min=MIN_TAIL).log()).clamp(SMALLEST_U, 1) / 10
        near = (left_NE > tail * torch.exp(-window)) & (left_NE <= tail * torch.exp(window))
        return near.sum() / (2 * window)

    @torch.no_grad()
    def restart(self, p0: float) -> None:
        """Begin again at the threshold `p0`, or the bound next to it, with nothing integrated."""
        p0 = min(max(p0, self.config.p_min), self.config.p_max)
        self.p.fill_(p0)
        self.p0.fill_(p0)
        self.error_sum.zero_()
