"""BEAM (arXiv 2605.14438): a second router masks some of each token's top-k experts; the mask is learned, too.

Published is a loss that makes the mask sparser, and its coefficient decides how many experts stay. A budget, of ours,
has a bias in the mask instead, which holds that number at the target.
"""

# N tokens, D width, E experts, K candidates

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, Choice, Router, RouterConfig, Scores
from dit_moe.moe.routing import best_experts

GAIN = 1.25  # half of what would make up for an error in one step if logits were spread normally around 0


@dataclass(frozen=True, kw_only=True)
class BEAMConfig(RouterConfig):
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("renormalize", "bias_rate", "min_experts", "max_experts")
    FORMER: ClassVar[tuple[str, ...]] = ("growth", "damping")  # of the budget when it steered mask_loss

    renormalize: bool | None = False
    candidates: int | None = None  # K; None: 2 · target, as half of them stayed in the paper's models, or all experts
    budget: bool = True  # steer a bias of the mask so that `target` experts stay on average
    mask_loss: float = 0.0  # β of the paper, which without a budget decides how many experts stay

    @property
    def held(self) -> bool:
        return self.budget

    @property
    def controlled(self) -> bool:
        return self.budget

    def check(self, experts: int, target: float) -> None:
        super().check(experts, target)
        if self.candidates is not None:
            require(target <= self.candidates <= experts, self, "candidates", f"must lie in [{target:g}, {experts}]")

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        return 2 * matrices, others

    def peak(self, experts: int, target: float) -> int:
        """K: training computes all candidates."""
        return self.candidates or min(experts, math.ceil(2 * target))

    def note(self, target: float, experts: int, tokens: int | None) -> str:
        return "model.moe.router=beam computes all candidates in training; the masked ones are left out only afterwards"


@ROUTERS.register("beam", BEAMConfig)
class BEAMRouter(Router):
    """Gates are the softmax over the candidates, without those whose σ(W_m x + b) is below 1/2, and not renormalised.

    b is one for all layers, and 0 without a budget.
    """

    config: BEAMConfig
    mask_bias: Tensor

    def __init__(self, config: BEAMConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.candidates = config.peak(experts, target)
        self.mask_weight = nn.Parameter(torch.zeros(experts, config.input_width(width)))  # all candidates stay
        self.register_buffer("mask_bias", torch.tensor(0.0))

    @property
    def observed(self) -> int:
        return 2  # the candidates' W_m x, and its square

    def route(self, scores: Scores) -> Choice:
        candidate_NE = best_experts(scores.score_NE.detach(), self.candidates)
        prob_NE = scores.score_NE * candidate_NE
        logit_NE = F.linear(scores.x_ND, self.mask_weight.float())
        stay_NE = (logit_NE + self.mask_bias).sigmoid()
        mask_NE = candidate_NE & ~(stay_NE < 0.5)  # NaN stays, and is seen
        through_NE = mask_NE + stay_NE - stay_NE.detach()  # the mask, with the gradient of σ
        gate_NE = self.gates(prob_NE / prob_NE.sum(-1, keepdim=True) * through_NE, candidate_NE)
        chosen_NE = logit_NE.detach() * candidate_NE
        return Choice(
            mask_NE=candidate_NE if self.training else mask_NE,  # the masked ones learn, with a gate of 0
            gate_NE=gate_NE,
            counted_NE=mask_NE,
            observed_K=torch.stack([chosen_NE.sum(), chosen_NE.square().sum()]),
            losses={"mask": (stay_NE * candidate_NE).sum(-1).mean() / self.candidates},
        )

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        """An error counts in standard deviations of the logits, whose size depends on the learning rate."""
        super().after_step(own, model)
        if self.config.budget:
            mean, square = model.observed_K / self.candidates
            spread = (square - mean.square()).clamp(min=0).sqrt()
            missing = (self.target - model.active) / self.candidates
            self.mask_bias += (GAIN * spread * missing).nan_to_num()

    @staticmethod
    def upgrade_state(state: dict[str, Tensor], prefix: str) -> None:
        """Of a run whose budget steered the coefficient of the mask's loss: no bias."""
        if state.pop(f"{prefix}coefficient.integral", None) is not None:
            del state[f"{prefix}coefficient.value"]
            state[f"{prefix}mask_bias"] = torch.tensor(0.0)

    def state_numbers(self) -> dict[str, Tensor]:
        return super().state_numbers() | {"mask_bias": self.mask_bias}
