"""Top-k routing: every token uses the same number of experts (Shazeer et al. 2017)."""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_moe.config import ConfigError
from dit_moe.moe.routers.base import ROUTERS, Router, RouterConfig, Score


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

    def select(self, score_NE: Tensor) -> Tensor:
        best_NK = self.ranking(score_NE).topk(int(self.k), dim=-1).indices
        return torch.zeros_like(score_NE, dtype=torch.bool).scatter(-1, best_NK, True)
