"""Expert Threshold routing (arXiv 2603.11535): an expert is active where its score exceeds a threshold of its own.

The threshold is a moving average of the score of the last of the expert's best tokens, as many as are its even share.
So each expert has that load, and a token the target, in the mean, though a token's experts depend on it alone. The
score is measured from histograms, which add up over micro-batches and processes as quantiles do not.
"""

# N tokens, E experts, J bins of a histogram

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, Choice, Score, Scores, Sees
from dit_moe.moe.routers.thresholds import ThresholdConfig, ThresholdRouter
from dit_moe.moe.routing import best_pairs, best_tokens

# Log-odds of scores are counted from −12 to 12, and those beyond as these. A bin is 0.012 wide: to take its scores for
# evenly spread errs by less than 1 % of a load where log-odds have a standard deviation of 0.1 or more.
WIDEST, BINS = 12.0, 2048


@dataclass(frozen=True, kw_only=True)
class ExpertThresholdConfig(ThresholdConfig):
    SCORES: ClassVar[tuple[Score, ...]] = ("softmax", "sigmoid")
    controlled = True

    threshold_decay: float = 0.999
    warmup_steps: int = 4000  # of expert choice over the batch; then a token alone decides

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.warmup_steps >= 0, self, "warmup_steps", "must be at least 0")

    @property
    def sees(self) -> Sees:
        return "batch" if self.warmup_steps else "token"


@ROUTERS.register("expert_threshold", ExpertThresholdConfig)
class ExpertThresholdRouter(ThresholdRouter):
    """Every expert whose score exceeds its threshold; as long as there is none, the token's best ⌊target⌋."""

    config: ExpertThresholdConfig

    @property
    def observed(self) -> int:
        return self.experts * BINS

    def route(self, scores: Scores) -> Choice:
        score_NE = scores.score_NE.detach()
        if self.training and self.steps < self.config.warmup_steps:
            mask_NE = best_tokens(score_NE, self.target)
        elif self.steps == 0:
            mask_NE = best_pairs(score_NE, int(self.target), samples=len(score_NE))
        else:
            mask_NE = ~(score_NE <= self.threshold_K)  # true where it is NaN
        observed_K = self.histograms(score_NE) if self.training else None
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE), observed_K=observed_K)

    def histograms(self, score_NE: Tensor) -> Tensor:
        """How many tokens each expert has in each bin, float64 [E·J]."""
        odds_NE = score_NE.logit().clamp(-WIDEST, WIDEST).nan_to_num()
        bin_NE = ((odds_NE + WIDEST) * (BINS / (2 * WIDEST))).long().clamp(max=BINS - 1)
        cell_P = (bin_NE + BINS * torch.arange(self.experts, device=score_NE.device)).flatten()
        counts_K = score_NE.new_zeros(self.observed, dtype=torch.float64)
        return counts_K.index_add_(0, cell_P, counts_K.new_ones(len(cell_P)))

    def measured(self, own: RouterStats) -> Tensor:
        above_EJ = own.observed_K.view(self.experts, BINS).flip(-1).cumsum(-1)  # share of tokens from each bin on up
        wanted_E1 = torch.full_like(above_EJ[:, :1], self.target / self.experts)
        j_E1 = torch.searchsorted(above_EJ, wanted_E1 - 1e-12).clamp(max=BINS - 1)
        reached_E1 = above_EJ.gather(-1, j_E1)
        before_E1 = above_EJ.gather(-1, (j_E1 - 1).clamp(min=0)) * (j_E1 > 0)
        bins_E1 = j_E1 + (wanted_E1 - before_E1) / (reached_E1 - before_E1)
        return (WIDEST - 2 * WIDEST / BINS * bins_E1).sigmoid().squeeze(-1)
