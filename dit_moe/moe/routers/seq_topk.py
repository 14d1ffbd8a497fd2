"""SeqTopK: the best (token, expert) pairs of a sample, as many as top-k would have (arXiv 2511.06494).

Tokens that several experts fit get more of them, at the cost of those that few fit. Published for text, where the best
pairs of a sequence depend on later tokens; here for images, whose tokens may see all of their sample.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_moe.moe.routers.base import ROUTERS, Choice, Router, RouterConfig, Score, Scores, Sees
from dit_moe.moe.routing import best_pairs


@dataclass(frozen=True, kw_only=True)
class SeqTopKConfig(RouterConfig):
    """The ⌊target·S⌋ best pairs of a sample of S tokens, at most `max_experts` of a token."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = "k"
    MAY_SKIP: ClassVar[bool] = True
    SCORES: ClassVar[tuple[Score, ...]] = ("softmax", "sigmoid")
    UNUSED: ClassVar[tuple[str, ...]] = ("min_experts",)

    @property
    def sees(self) -> Sees:
        return "sample"


@ROUTERS.register("seq_topk", SeqTopKConfig)
class SeqTopKRouter(Router):
    """The best pairs of a sample, ranked by score."""

    def route(self, scores: Scores) -> Choice:
        mask_NE = best_pairs(self.capped(scores.score_NE.detach()), self.k, scores.context.samples)
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE))

    def capped(self, score_NE: Tensor) -> Tensor:
        """What pairs are ranked by; below all others for experts that are not among a token's best `max_experts`."""
        ranking_NE = self.ranking(score_NE)
        best_NK = ranking_NE.sort(dim=-1, descending=True, stable=True).indices[:, : self.most]
        return torch.full_like(ranking_NE, -torch.inf).scatter(-1, best_NK, ranking_NE.gather(-1, best_NK))
