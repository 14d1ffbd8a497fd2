"""The PI controller that holds the mean number of active experts at its target by moving the threshold p.

It stands outside the graph and steps once per optimizer step. Its state is three numbers in persistent buffers, so a
checkpoint and an EMA copy carry it, and evaluation finds p frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit_moe.config import require

MIN_TAIL = 1e-6  # in tail space a p nearer to 1 than this is 1: every expert is active


DEFAULT_GAINS = {"tail": (0.5, 2.0), "p": (0.1, 0.3)}  # (K_P, K_I), found as docs/controller.md tells


@dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """Gains and bounds of the controller. docs/controller.md has the study that the defaults come from."""

    space: Literal["tail", "p"] = "tail"  # what the equation moves: −ln(1 − p), or p itself as the paper writes it
    kp: float | None = None  # proportional gain K_P, per unit of error (T − a)/E; None: the default of the space
    ki: float | None = None  # integral gain K_I: how fast a wrong start, or a drifting router, is made up for
    p0: float = 0.5  # threshold before the first step, unless it is solved on the first batch
    p_min: float = 0.0
    p_max: float = 1.0

    def __post_init__(self) -> None:
        for name, default in zip(("kp", "ki"), DEFAULT_GAINS[self.space], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            require(getattr(self, name) >= 0, self, name, "must be at least 0")
        require(0 <= self.p_min <= self.p_max <= 1, self, "p_min", f"must lie between 0 and p_max={self.p_max} ≤ 1")
        require(self.p_min <= self.p0 <= self.p_max, self, "p0", f"must lie in [{self.p_min}, {self.p_max}]")


class PIController(nn.Module):
    """u_{t+1} = u_0 + K_P·e_t + K_I·Σ_{s≤t} e_s with e_t = (target − a_t) / experts; p = clip(p(u)). DTop-p, step 4.

    The paper has u = p (``space="p"``). Experts join ever faster as p nears 1, so a gain on p that is right at
    T/N = 1/8 oscillates at T/N = 1/2 once the router is sharp. On u = −ln(1 − p), the logarithm of the mass left out,
    the loop gain hardly changes, and one pair of gains serves from 4 to 128 experts (``space="tail"``).

    Integration stops while p sits at a bound and the error pushes further out (anti-windup).
    """

    p: Tensor
    p0: Tensor
    error_sum: Tensor

    def __init__(self, config: ControllerConfig, target: float, experts: int) -> None:
        super().__init__()
        self.config, self.target, self.experts = config, target, experts
        # fp32 in every copy: in bf16 the threshold would move in steps of 0.004.
        self.register_buffer("p", torch.tensor(config.p0, dtype=torch.float32))
        self.register_buffer("p0", torch.tensor(config.p0, dtype=torch.float32))
        self.register_buffer("error_sum", torch.tensor(0.0, dtype=torch.float64))

    @torch.no_grad()
    def step(self, active: Tensor) -> None:
        """Move p after a step that used `active` experts a token on average (scalar, reduced over all ranks)."""
        c = self.config
        error = (self.target - active.to(torch.float64)) / self.experts
        candidate = self.error_sum + error
        assert c.kp is not None and c.ki is not None
        p = self._to_p(self._from_p(self.p0.to(torch.float64)) + c.kp * error + c.ki * candidate)
        outward = ((p >= c.p_max) & (error > 0)) | ((p <= c.p_min) & (error < 0))
        self.error_sum.copy_(torch.where(outward, self.error_sum, candidate))
        self.p.copy_(p.clamp(c.p_min, c.p_max))

    def _from_p(self, p: Tensor) -> Tensor:
        return p if self.config.space == "p" else -torch.log1p(-p.clamp(max=1 - MIN_TAIL))

    def _to_p(self, u: Tensor) -> Tensor:
        if self.config.space == "p":
            return u
        p = -torch.expm1(-u)
        return torch.where(p >= 1 - MIN_TAIL, torch.ones_like(p), p)

    @torch.no_grad()
    def restart(self, p0: float) -> None:
        """Begin again at the threshold `p0`, with nothing integrated."""
        self.p.fill_(p0)
        self.p0.fill_(p0)
        self.error_sum.zero_()
