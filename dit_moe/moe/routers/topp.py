"""Top-p routing with a fixed threshold (Huang et al. 2024): how many experts are active is what the router makes it."""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.routers.base import ROUTERS, Router, RouterConfig
from dit_moe.moe.routing import limit_experts, mass_left, prefix_mask, threshold_p, threshold_tail, threshold_u


@dataclass(frozen=True, kw_only=True)
class TopPConfig(RouterConfig):
    """The model's target sizes its experts; nothing holds the router to it."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = "p"

    dynamic_loss: float = 1e-3
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.p <= 1, self, "p", "must lie in (0, 1]")

    @property
    def held(self) -> bool:
        return False


@ROUTERS.register("topp", TopPConfig)
class TopPRouter(Router):
    """The smallest set of best experts whose probability reaches p."""

    config: TopPConfig

    def ranked(self, prob_NE: Tensor) -> tuple[Tensor, Tensor]:
        """`mass_left` within the limits of experts per token."""
        left_NE, order_NE = mass_left(prob_NE, self.ranking(prob_NE) if self.config.bias_rate else None)
        return limit_experts(left_NE, self.config.min_experts, self.most), order_NE

    def tail(self) -> Tensor | float:
        """1 − p of the threshold in effect: the mass that may be left out."""
        return self.trained_tail() if self.override is None else threshold_tail(self.override)

    def threshold(self) -> float:
        """The p in effect."""
        return threshold_p(self.trained_u() if self.override is None else self.override)

    def trained_tail(self) -> Tensor | float:
        """1 − p of the threshold that the router was trained with."""
        return threshold_tail(self.trained_u())

    def trained_u(self) -> float:
        """The same threshold as `threshold_u` has it; the device is waited for."""
        return threshold_u(self.config.p)

    def select(self, score_NE: Tensor) -> Tensor:
        return prefix_mask(*self.ranked(score_NE), tail=self.tail())
