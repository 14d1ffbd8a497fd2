"""What routers share that choose among the tokens of a batch in training, and by thresholds in evaluation.

There no token may depend on other images. The thresholds are moving averages over the steps of training.
"""

# N tokens, E experts, K thresholds, J bins of a histogram

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import Router, RouterConfig, Sees

# Histograms count log-odds of scores from −12 to 12, and those beyond as these. A bin is 0.012 wide: to take its scores
# for evenly spread errs by less than 1 % of a load where log-odds have a standard deviation of 0.1 or more.
WIDEST, BINS = 12.0, 2048


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(RouterConfig):
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("bias_rate", "min_experts", "max_experts")

    renormalize: bool | None = False
    balance_loss: float = 0.0
    threshold_decay: float = 0.95  # of the moving averages, per step

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold_decay < 1, self, "threshold_decay", "must lie in [0, 1)")

    @property
    def sees(self) -> Sees:
        return "batch"


class ThresholdRouter(Router):
    """`threshold_K` follows what `measured` says of each step; as many as the `thresholds` of a subclass."""

    config: ThresholdConfig
    threshold_K: Tensor
    steps: Tensor

    def __init__(self, config: ThresholdConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.register_buffer("threshold_K", torch.zeros(self.thresholds))
        self.register_buffer("steps", torch.tensor(0))  # that moved the thresholds

    @property
    def thresholds(self) -> int:
        """K: one for each expert."""
        return self.experts

    @property
    def observed(self) -> int:
        return self.thresholds

    def measured(self, own: RouterStats) -> Tensor:
        """The thresholds of a step by itself, [K], NaN if it had no tokens: here the mean of what `route` observed."""
        return own.observed_K

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        measured_K = self.measured(own)
        counted_K = ~measured_K.isnan()
        self.steps += counted_K.any()
        # The plain mean of the first steps, so that it does not matter where the thresholds begin.
        share = (1 / self.steps.clamp(min=1)).clamp(min=1 - self.config.threshold_decay)
        moved_K = self.threshold_K + share * (measured_K - self.threshold_K)
        self.threshold_K.copy_(torch.where(counted_K, moved_K, self.threshold_K))

    def state_numbers(self) -> dict[str, Tensor]:
        return super().state_numbers() | {"threshold": self.threshold_K.mean()}


def score_histograms(score_NE: Tensor) -> Tensor:
    """How many tokens each expert has in each bin of scores in (0, 1), float64 [E·J]."""
    experts = score_NE.shape[1]
    odds_NE = score_NE.logit().clamp(-WIDEST, WIDEST).nan_to_num()
    bin_NE = ((odds_NE + WIDEST) * (BINS / (2 * WIDEST))).long().clamp(max=BINS - 1)
    cell_P = (bin_NE + BINS * torch.arange(experts, device=score_NE.device)).flatten()
    counts_K = score_NE.new_zeros(experts * BINS, dtype=torch.float64)
    return counts_K.index_add_(0, cell_P, counts_K.new_ones(len(cell_P)))


def score_of_share(share_EJ: Tensor, share: float) -> Tensor:
    """The score that this share of an expert's tokens exceeds, [E], from the shares in each bin; NaN of no tokens."""
    above_EJ = share_EJ.flip(-1).cumsum(-1)  # from each bin on up, the highest first
    wanted_E1 = torch.full_like(above_EJ[:, :1], share)
    j_E1 = torch.searchsorted(above_EJ, wanted_E1 - 1e-12).clamp(max=BINS - 1)  # the bin that reaches it
    reached_E1 = above_EJ.gather(-1, j_E1)
    before_E1 = above_EJ.gather(-1, (j_E1 - 1).clamp(min=0)) * (j_E1 > 0)
    bins_E1 = j_E1 + (wanted_E1 - before_E1) / (reached_E1 - before_E1)
    return (WIDEST - 2 * WIDEST / BINS * bins_E1).sigmoid().squeeze(-1)
