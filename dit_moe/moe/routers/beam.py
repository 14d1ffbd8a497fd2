"""BEAM (arXiv 2605.14438): a second router masks some of each token's top-k experts; the mask is learned, too."""

# N tokens, D width, E experts, K candidates

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.routers.base import ROUTERS, Choice, Scores
from dit_moe.moe.routers.steered_loss import SteeredLossConfig, SteeredLossRouter
from dit_moe.moe.routing import best_experts


@dataclass(frozen=True, kw_only=True)
class BEAMConfig(SteeredLossConfig):
    """`mask_loss` is β of the paper, which decides how many experts stay; with a budget, β before the first step."""

    candidates: int | None = None  # K; None: 2 · target, as half of them stayed in the paper's models, or all experts
    mask_loss: float = 1e-8  # small, as it is the mask's only gradient while the blocks of a DiT add nothing
    budget: bool = True  # steer β so that `target` experts stay on average, as ReMoE steers λ

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mask_loss > 0 or not self.budget, self, "mask_loss", "must be above 0 for a budget")

    @property
    def held(self) -> bool:
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
class BEAMRouter(SteeredLossRouter):
    """Gates are the softmax over the candidates, without those whose σ(W_m x) is below 1/2, and not renormalised."""

    config: BEAMConfig

    def __init__(self, config: BEAMConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.candidates = config.peak(experts, target)
        self.mask_weight = nn.Parameter(torch.zeros(experts, config.input_width(width)))  # all candidates stay

    def route(self, scores: Scores) -> Choice:
        candidate_NE = best_experts(scores.score_NE.detach(), self.candidates)
        prob_NE = scores.score_NE * candidate_NE
        stay_NE = F.linear(scores.x_ND, self.mask_weight.float()).sigmoid()
        mask_NE = candidate_NE & ~(stay_NE < 0.5)  # NaN stays, and is seen
        through_NE = mask_NE + stay_NE - stay_NE.detach()  # the mask, with the gradient of σ
        gate_NE = self.gates(prob_NE / prob_NE.sum(-1, keepdim=True) * through_NE, candidate_NE)
        mean = (stay_NE * candidate_NE).sum(-1).mean() / self.candidates
        return Choice(
            mask_NE=candidate_NE if self.training else mask_NE,  # the masked ones learn, with a gate of 0
            gate_NE=gate_NE,
            counted_NE=mask_NE,
            losses={"mask": self.coefficient.value * mean},
        )

    def state_numbers(self) -> dict[str, Tensor]:
        return super().state_numbers() | {"beta": self.config.mask_loss * self.coefficient.value}
