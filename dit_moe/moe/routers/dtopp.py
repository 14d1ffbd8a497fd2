"""DTop-p routing (Jin et al., arXiv 2512.13996): top-p whose threshold a PI controller holds the target with.

Global (the main method): one error for all layers, so that the normalization can move compute between layers.
Layer-wise: each layer holds the target by itself.

The controller stands outside the graph and steps once per optimizer step. Its state is in persistent buffers, so a
checkpoint and an EMA copy carry it, and evaluation finds p frozen. What is kept is u = −ln(1 − p), since a sharp router
needs a p that differs from 1 by less than p itself can.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, Choice, RouterConfig, Scores
from dit_moe.moe.routers.topp import TopPRouter
from dit_moe.moe.routing import LARGEST_U, RoutingContext, prefix_mask, threshold_u

SMALLEST_U = 0.05  # steps and windows are sized relative to u, but to no less than this
MIN_SLOPE = 0.05  # in targets per unit of u: no error is divided by less; a threshold out of reach has slope 0
MOST_UP = 0.1  # an error that raises u counts as at most this share of it …
REACHED = 0.9  # … once the mean has been at this share of the target
MIN_TAIL_BEFORE = 1e-6  # while p was kept, one nearer to 1 than this was taken for 1
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
    anti_windup: bool | None = None  # stop integrating while p sits at a bound; None: unless the law is the paper's

    def __post_init__(self) -> None:
        for name, default in zip(("kp", "ki"), DEFAULT_GAINS[self.law], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            require(getattr(self, name) >= 0, self, name, "must be at least 0")
        if self.anti_windup is None:
            object.__setattr__(self, "anti_windup", self.law != "paper")
        require(0 <= self.p_min <= self.p_max <= 1, self, "p_min", f"must lie between 0 and p_max={self.p_max} ≤ 1")
        inside = self.p0 is None or self.p_min <= self.p0 <= self.p_max
        require(inside, self, "p0", f"must lie in [{self.p_min}, {self.p_max}]")


@dataclass(frozen=True, kw_only=True)
class DTopPConfig(RouterConfig):
    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = "p"

    drn: bool = True
    dynamic_loss: float = 1e-3
    layerwise: bool = False
    theta_by_time: bool = False  # DRN's scale is θ·exp(w·time embedding): noise levels may differ in active experts
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.drn or not self.theta_by_time, self, "theta_by_time", "scales what drn normalises; set drn: true")

    def check_text(self) -> None:
        super().check_text()
        require(not self.theta_by_time, self, "theta_by_time", "is for images, whose blocks are told the time; drop it")

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        return matrices, others + (width if self.theta_by_time else 0)

    @property
    def controlled(self) -> bool:
        """A controller without gains leaves the threshold where it began."""
        return bool(self.controller.kp or self.controller.ki)

    def note(self, target: float, experts: int, tokens: int | None) -> str | None:
        if target > 1 or not self.controlled:
            return None
        what = "the threshold falls until every token uses one expert"
        return f"model.moe.target=1: {what}; for dynamic routing use a target above 1"


@ROUTERS.register("dtopp", DTopPConfig)
class DTopPRouter(TopPRouter):
    """Top-p with a threshold of its own, moved after every optimizer step.

    In global mode the controllers of all layers see the same error and so stay equal, bit for bit.
    """

    config: DTopPConfig  # type: ignore[assignment]

    def __init__(self, config: DTopPConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.controller = PIController(config.controller, target, experts)
        # Zeros: it starts as plain DTop-p.
        self.time_weight = nn.Parameter(torch.zeros(width)) if config.theta_by_time else None

    @property
    def observed(self) -> int:
        return 1  # how fast the pairs grow with the threshold

    def normalized(self, logits_NE: Tensor, context: RoutingContext) -> Tensor:
        normal_NE = super().normalized(logits_NE, context)
        if self.time_weight is None:
            return normal_NE
        assert context.time_BD is not None, "the model gave no embedding of the time"
        log_scale_B = context.time_BD.float() @ self.time_weight.float()
        return normal_NE * context.by_token(log_scale_B.exp(), len(normal_NE))[:, None]

    def trained_tail(self) -> Tensor:
        return self.controller.tail

    def trained_u(self) -> float:
        return self.controller.u.item()

    def route(self, scores: Scores) -> Choice:
        left_NE, order_NE = self.ranked(scores.prob_NE.detach())
        mask_NE = prefix_mask(left_NE, order_NE, tail=self.tail())
        slope_1 = self.controller.slope(left_NE)[None] if self.training else None
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE), observed_K=slope_1)

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        counted = own if self.config.layerwise else model
        self.controller.step(counted.active, counted.observed_K[0])

    def state_numbers(self) -> dict[str, Tensor]:
        return super().state_numbers() | {"p": self.controller.p}


class PIController(nn.Module):
    """u_{t+1} = u_0 + K_P·e_t + K_I·Σ_{s≤t} e_s, p = clip(p(u)): proportional and integral control. DTop-p, step 4.

    The law ``paper`` has u = p and e = (target − active) / experts. How much a step of p changes depends on the number
    of experts, on the target and on how sharp the router has become, by a factor of a hundred and more, so gains that
    are right for one model, or early in training, oscillate or crawl in another.

    The law ``scheduled`` counts the error in units of what it moves: e = (target − active) / slope, where the slope
    d active / d u is measured on the same tokens, so that 1/K_I is the number of steps in which any model makes up for
    an error. u = −ln(1 − p), the logarithm of the mass left out, keeps the slope steady near p = 1; e is cut to ±u, so
    that a threshold far from anybody's reach moves by its own size.

    A router that has sharpened at a high learning rate may flatten again within two steps, and a threshold that had
    followed it up would let in several times the target. So, once the target was reached, e is cut to u/10 upward.

    With `anti_windup` integration stops while p sits at a bound and the error pushes further out. The paper's law has
    none, and comes back from a bound only when as much error of the other sign was added up.
    """

    u: Tensor
    u0: Tensor
    error_sum: Tensor
    reached: Tensor

    def __init__(self, config: ControllerConfig, target: float, experts: int) -> None:
        super().__init__()
        self.config, self.target, self.experts = config, target, experts
        self.lowest, self.highest = threshold_u(config.p_min), threshold_u(config.p_max)
        u0 = threshold_u((config.p_min + config.p_max) / 2 if config.p0 is None else config.p0)
        self.register_buffer("u", torch.tensor(u0, dtype=torch.float64))
        self.register_buffer("u0", torch.tensor(u0, dtype=torch.float64))
        self.register_buffer("error_sum", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("reached", torch.tensor(False))
        self.register_load_state_dict_pre_hook(_upgrade)

    @torch.no_grad()
    def step(self, active: Tensor, slope: Tensor) -> None:
        """Move p after a step that used `active` experts a token on average.

        Args:
            active: scalar, reduced over all ranks; NaN, the mean of no tokens, moves nothing.
            slope: scalar, how fast `active` grows with u, likewise (the law ``paper`` ignores it).
        """
        c = self.config
        assert c.kp is not None and c.ki is not None
        active, slope, counted = active.to(torch.float64), slope.to(torch.float64), ~active.isnan()
        self.reached |= active >= REACHED * self.target
        error = self._error(active, slope)
        candidate = self.error_sum + error
        move = c.kp * error + c.ki * candidate
        # The law of the paper adds up in p.
        u = _to_u(_to_p(self.u0) + move) if c.law == "paper" else self.u0 + move
        outward = ((u >= self.highest) & (error > 0)) | ((u <= self.lowest) & (error < 0))
        added = counted & ~outward if c.anti_windup else counted
        self.error_sum.copy_(torch.where(added, candidate, self.error_sum))
        self.u.copy_(torch.where(counted, u.clamp(self.lowest, self.highest), self.u))

    def _error(self, active: Tensor, slope: Tensor) -> Tensor:
        if self.config.law == "paper":
            return (self.target - active) / self.experts
        most = self.u.clamp(min=SMALLEST_U)
        most_up = torch.where(self.reached, MOST_UP * most, most)
        return ((self.target - active) / slope.clamp(min=MIN_SLOPE * self.target)).clamp(-most, most_up)

    @property
    def p(self) -> Tensor:
        """The threshold, as it is reported."""
        return _to_p(self.u)

    @property
    def tail(self) -> Tensor:
        """1 − p, exact where p itself would round to 1."""
        return torch.where(self.u >= LARGEST_U, 0.0, (-self.u).exp())

    def slope(self, left_NE: Tensor) -> Tensor:
        """How fast the number of pairs grows with u at the threshold, from those that stand near it (see `mass_left`).

        A sum over the tokens, so that layers, micro-batches and ranks add up.
        """
        tail, window = self.tail, self.u.clamp(SMALLEST_U, 1) / 10
        near = (left_NE > tail * torch.exp(-window)) & (left_NE <= tail * torch.exp(window))
        return near.sum() / (2 * window)

    @torch.no_grad()
    def restart(self, u0: float) -> None:
        """Begin again at the threshold `u0`, or the bound next to it, with nothing integrated."""
        u0 = min(max(u0, self.lowest), self.highest)
        self.u.fill_(u0)
        self.u0.fill_(u0)
        self.error_sum.zero_()
        self.reached.fill_(False)

    @staticmethod
    def upgrade_state(state: dict[str, Any], prefix: str) -> None:
        """Turn what was saved while p and p0 were kept, in fp32, into what is kept now, with the same threshold."""
        if f"{prefix}p" not in state or f"{prefix}p0" not in state:
            return
        p, p0 = (state.pop(prefix + name).to(torch.float64) for name in ("p", "p0"))
        state[f"{prefix}u"] = _to_u(torch.where(p >= 1 - MIN_TAIL_BEFORE, 1.0, p))
        state[f"{prefix}u0"] = _to_u(p0.clamp(max=1 - MIN_TAIL_BEFORE))  # what error_sum was added to
        state[f"{prefix}reached"] = torch.ones_like(p, dtype=torch.bool)


def _upgrade(module: PIController, state: dict[str, Any], prefix: str, *_: object) -> None:
    module.upgrade_state(state, prefix)


def _to_u(p: Tensor) -> Tensor:
    return (-torch.log1p(-p.clamp(max=1))).clamp(max=LARGEST_U)


def _to_p(u: Tensor) -> Tensor:
    return torch.where(u >= LARGEST_U, 1.0, -torch.expm1(-u))
