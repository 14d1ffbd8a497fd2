"""ReMoE (Wang et al., arXiv 2412.14711): experts whose ReLU is above 0, as many as a steered L1 loss leaves.

The load in the loss is that of the step before, and the coefficient λ is damped and has a least value, λ_0.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, TINY, Choice, Router, RouterConfig, Score, Scores
from dit_moe.moe.routers.coefficient import Coefficient


@dataclass(frozen=True, kw_only=True)
class ReMoEConfig(RouterConfig):
    SCORES: ClassVar[tuple[Score, ...]] = ("identity",)
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("renormalize", "bias_rate", "min_experts", "max_experts")
    controlled = True

    score: Score = "identity"
    renormalize: bool | None = False
    balance_loss: float = 0.0  # the load is in the sparsity loss
    sparsity_loss: float = 1e-8  # λ_0
    growth: float = 1.2  # of λ in a step
    damping: float = 20.0  # see `Coefficient`; 0 is what is published

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.sparsity_loss > 0, self, "sparsity_loss", "must be above 0")
        require(self.growth > 1, self, "growth", "must be above 1")
        require(self.damping >= 0, self, "damping", "must be at least 0")

    def peak(self, experts: int, target: float) -> float | None:
        """About half of the scores are above 0 before training."""
        return max(super().peak(experts, target) or 0, experts / 2)


@ROUTERS.register("remoe", ReMoEConfig)
class ReMoERouter(Router):
    """Gates are ReLU(W x). `load_E` is f of the paper: the pairs of each expert over target · N, of the step before.

    All layers move λ by the same error, and so to the same.
    """

    config: ReMoEConfig

    def __init__(self, config: ReMoEConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.coefficient = Coefficient(config.growth, config.damping)

    def select(self, score_NE: Tensor) -> Tensor:
        return ~(score_NE <= 0)  # NaN is chosen, and seen

    def losses(self, scores: Scores, choice: Choice) -> dict[str, Tensor]:
        mean_E = scores.score_NE.relu().mean(0)
        sparsity = self.coefficient.value * self.experts * (self.load_E * mean_E).sum()
        return super().losses(scores, choice) | {"sparsity": sparsity}

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        self.coefficient.step(model.active, self.target)
        self.load_E.mul_((own.active / self.target).nan_to_num(1))

    def load(self) -> Tensor:
        return self.load_E / self.load_E.sum().clamp(min=TINY)

    def state_numbers(self) -> dict[str, Tensor]:
        return super().state_numbers() | {"lambda": self.config.sparsity_loss * self.coefficient.value}
