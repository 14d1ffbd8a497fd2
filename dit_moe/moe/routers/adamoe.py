"""AdaMoE (Zeng et al., arXiv 2406.13233): top-k of experts and of null experts, which compute nothing."""

# E experts, W null experts, R = E + W rows of scores

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.routers.base import ROUTERS, Choice, Scores
from dit_moe.moe.routers.weightless import WeightlessConfig, WeightlessRouter


@dataclass(frozen=True, kw_only=True)
class AdaMoEConfig(WeightlessConfig):
    """At balance k·E/(E + null_experts) experts of a token are active."""

    balance_loss: float = 0.1  # with 0.01 the mean was 7 % off the target on the digits
    null_experts: int | None = None  # None: from E on, the least with which a whole k makes the target

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.null_experts is None or self.null_experts >= 0, self, "null_experts", "must be at least 0")

    @property
    def weightless(self) -> int | None:
        return self.null_experts

    def having(self, weightless: int) -> Self:
        return replace(self, null_experts=weightless)

    def fewest(self, experts: int) -> int:
        return experts


@ROUTERS.register("adamoe", AdaMoEConfig)
class AdaMoERouter(WeightlessRouter):
    """The experts among the k best, with gates that null experts take no part in."""

    def route(self, scores: Scores) -> Choice:
        mask_NR = self.select(scores.score_NE.detach())
        mask_NE, null_NW = mask_NR[:, : self.experts], mask_NR[:, self.experts :]
        gate_NE = self.gates(scores.score_NE[:, : self.experts], mask_NE)
        return Choice(mask_NE=mask_NE, gate_NE=gate_NE, observed_K=null_NW.sum(0))

    def load(self) -> Tensor:
        """Null experts share their mean load, as it does not matter which of them is chosen."""
        load_E, load_W = super().load().split([self.experts, len(self.load_W)])
        return torch.cat([load_E, load_W.mean().expand_as(load_W)])
