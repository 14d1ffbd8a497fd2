"""Expert Threshold routing (arXiv 2603.11535): an expert is active where its score exceeds a threshold of its own.

The threshold is a moving average of the score of the last of the expert's best tokens, as many as are its even share.
So each expert has that load, and a token the target, in the mean, though a token's experts depend on it alone. The
score is measured from histograms, which add up over micro-batches and processes as quantiles do not.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, Choice, Score, Scores, Sees
from dit_moe.moe.routers.thresholds import BINS, ThresholdConfig, ThresholdRouter, score_histograms, score_of_share
from dit_moe.moe.routing import best_pairs, best_tokens


@dataclass(frozen=True, kw_only=True)
class ExpertThresholdConfig(ThresholdConfig):
    SCORES: ClassVar[tuple[Score, ...]] = ("softmax", "sigmoid")
    WAITS_FOR: ClassVar[str | None] = "how many steps its thresholds have followed"
    controlled = True

    threshold_decay: float = 0.999
    warmup_steps: int = 4000  # of expert choice over the batch; then a token alone decides

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.warmup_steps >= 0, self, "warmup_steps", "must be at least 0")

    @property
    def sees(self) -> Sees:
        return "batch" if self.warmup_steps else "token"

    def check_text(self) -> None:
        wanted = "chooses among the batch, so a language model would see the future; set it to 0, or choose dtopp"
        require(self.warmup_steps == 0, self, "warmup_steps", wanted)
        super().check_text()


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
        observed_K = score_histograms(score_NE) if self.training else None
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE), observed_K=observed_K)

    def measured(self, own: RouterStats) -> Tensor:
        return score_of_share(own.observed_K.view(self.experts, BINS), self.target / self.experts)
