"""Expert Race (Yuan et al., arXiv 2503.16057): the best (token, expert) pairs of the whole batch win.

So noisy images, which are harder, may get more experts than others. In evaluation a threshold takes the place of the
batch: the moving average of the worst score that won. The width of the hidden layer and the weights of both losses are
not published; ours are the tokens' and a guess at the order of magnitude.
"""

# N tokens, E experts, F numbers of a patch

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.moe.router_stats import similarity_loss
from dit_moe.moe.routers.base import ROUTERS, Choice, Score, Scores
from dit_moe.moe.routers.thresholds import ThresholdConfig, ThresholdRouter
from dit_moe.moe.routing import RoutingContext, best_pairs


@dataclass(frozen=True, kw_only=True)
class ExpertRaceConfig(ThresholdConfig):
    """The ⌊target·N⌋ best pairs of the N tokens that a process trains on at once."""

    SCORES: ClassVar[tuple[Score, ...]] = ("identity", "softmax", "sigmoid")

    score: Score = "identity"
    similarity_loss: float = 1e-2
    target_loss: float = 0.1  # per-layer regularisation: how well a linear head predicts the training target
    target_width: int | None = None  # (model) F; None: no head
    threshold_decay: float = 0.99

    def for_patches(self, numbers: int) -> Self:
        return replace(self, target_width=numbers if self.target_loss else None)

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        read = self.input_width(width)
        return matrices + read * read, others + (self.target_width or 0) * read  # the head works in training alone

    def saved(self, experts: int, width: int) -> float:
        """The hidden layer too, before and after the activation, and what the head says beside the target."""
        return super().saved(experts, width) + 8 * self.input_width(width) + 4 * (self.target_width or 0)


@ROUTERS.register("expert_race", ExpertRaceConfig)
class ExpertRaceRouter(ThresholdRouter):
    """z = W₂·GELU(W₁·x), where W₂ is the weight that every router has; pairs are ranked by z, and weighted with it."""

    config: ExpertRaceConfig
    thresholds = 1

    def __init__(self, config: ExpertRaceConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        read, numbers = config.input_width(width), config.target_width
        self.hidden = nn.Parameter(torch.randn(read, read) / math.sqrt(read))  # W₁
        self.head = nn.Parameter(torch.randn(numbers, read) / math.sqrt(read)) if numbers else None
        self.wants_target = numbers is not None

    def read(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        return F.gelu(F.linear(super().read(x_ND, context), self.hidden.float()))

    def route(self, scores: Scores) -> Choice:
        score_NE = scores.score_NE.detach()
        mask_NE = best_pairs(score_NE, self.target) if self.training else ~(score_NE < self.threshold_K)  # NaN: true
        won_P = score_NE.where(mask_NE, torch.inf).flatten()
        worst_1 = won_P.amin(0, keepdim=True) if len(won_P) else won_P.new_zeros(1)
        gate_NE = self.gates(scores.score_NE, mask_NE)
        return Choice(mask_NE=mask_NE, gate_NE=gate_NE, observed_K=len(score_NE) * worst_1)

    def losses(self, scores: Scores, choice: Choice) -> dict[str, Tensor]:
        """Beside the others `similarity`, and `target` if the objective gave its target."""
        terms = super().losses(scores, choice) | {"similarity": similarity_loss(scores.prob_NE, choice.mask_NE)}
        target_NF = scores.context.target_NF
        if self.head is not None and target_NF is not None:
            terms["target"] = F.mse_loss(F.linear(scores.x_ND, self.head.float()), target_NF.float())
        return terms
