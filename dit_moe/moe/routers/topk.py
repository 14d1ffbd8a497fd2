"""Top-k routing: every token uses the same number of experts (Shazeer et al. 2017)."""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.moe.routers.base import ROUTERS, Router, RouterConfig, Score
from dit_moe.moe.routing import best_experts


@dataclass(frozen=True, kw_only=True)
class TopKConfig(RouterConfig):
    """k is the model's target, which must be whole."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = "k"
    SCORES: ClassVar[tuple[Score, ...]] = ("softmax", "sigmoid", "identity", "cosine")

    def check(self, experts: int, target: float) -> None:
        super().check(experts, target)
        if target != int(target):
            raise ConfigError("target", f"={target:g} must be a whole number for top-k; choose dtopp for a fraction")


@ROUTERS.register("topk", TopKConfig)
class TopKRouter(Router):
    """The k experts of each token with the highest score."""

    @property
    def most(self) -> int:
        return int(self.k)

    def select(self, score_NE: Tensor) -> Tensor:
        return best_experts(self.ranking(score_NE), int(self.k))
