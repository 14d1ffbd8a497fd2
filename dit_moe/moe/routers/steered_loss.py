"""What ReMoE and BEAM share: a loss that makes routing sparser, with a coefficient that holds the target."""

# E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import Router, RouterConfig

MOST_DAMPED = 4.0  # at most a factor of e⁴


@dataclass(frozen=True, kw_only=True)
class SteeredLossConfig(RouterConfig):
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("renormalize", "bias_rate", "min_experts", "max_experts")

    renormalize: bool | None = False
    growth: float = 1.2  # of the coefficient in a step
    damping: float = 20.0  # see `Coefficient`; 0 is what is published

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.growth > 1, self, "growth", "must be above 1")
        require(self.damping >= 0, self, "damping", "must be at least 0")

    @property
    def controlled(self) -> bool:
        return self.held


class SteeredLossRouter(Router):
    """`self.coefficient.value` is for a term of `losses`; all layers move it by the same error, and so to the same."""

    config: SteeredLossConfig

    def __init__(self, config: SteeredLossConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.coefficient = Coefficient(config.growth, config.damping)

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        if self.config.controlled:
            self.coefficient.step(model.active, self.target)


class Coefficient(nn.Module):
    """Of a loss, relative to its start: grows by a factor after each step with more experts than the target (ReMoE).

    It falls by that factor after a step with fewer, but not below its start, where it has no effect already. Weights go
    on moving after it has turned back, so by itself it swings around the target. `damping` adds to the logarithm of
    what is used, for the next step alone, so many times the error as a share of the target.
    """

    integral: Tensor
    value: Tensor

    def __init__(self, growth: float, damping: float) -> None:
        super().__init__()
        self.growth, self.damping = growth, damping
        self.register_buffer("integral", torch.tensor(1.0))  # what is published
        self.register_buffer("value", torch.tensor(1.0))  # what the loss is multiplied by

    def step(self, active: Tensor, target: float) -> None:
        """After a step with `active` experts a token; NaN, the mean of no tokens, moves nothing."""
        error = active / target - 1
        self.integral.mul_(self.growth ** error.sign().nan_to_num()).clamp_(min=1)
        damped = self.integral * (self.damping * error).clamp(-MOST_DAMPED, MOST_DAMPED).exp()
        self.value.copy_(torch.where(error.isnan(), self.value, damped))
