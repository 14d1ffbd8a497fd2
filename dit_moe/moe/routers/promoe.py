"""ProMoE (ICLR 2026): tokens go to the prototype that they resemble most; those of samples without a class do not.

The published model has one expert per token, which a target above 1 generalises.
"""

# N tokens, D width, E experts, P prototypes, K experts per token

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.moe.routers.base import ROUTERS, Choice, Router, Score, Scores
from dit_moe.moe.routers.topk import TopKConfig
from dit_moe.moe.routing import RoutingContext, best_experts

TEMPERATURE = 0.07  # of the contrastive loss


@dataclass(frozen=True, kw_only=True)
class ProMoEConfig(TopKConfig):
    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = None
    SCORES: ClassVar[tuple[Score, ...]] = ("cosine",)
    WAITS_FOR: ClassVar[str | None] = "which prototypes have tokens"
    NEEDS_LABELS: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("renormalize", "bias_rate", "min_experts", "max_experts")

    score: Score = "cosine"
    renormalize: bool | None = False
    balance_loss: float = 0.0
    contrastive_loss: float = 1.0

    def rows(self, experts: int) -> int:
        """One prototype for each expert but the last; a single expert serves both kinds of tokens."""
        return max(1, experts - 1)

    def remark(self, experts: int) -> str | None:
        what = "serves images without a class alone, as guidance has them; those here have theirs, so it is not used."
        return f"Expert {experts - 1} {what}" if experts > 1 else None


@ROUTERS.register("promoe", ProMoEConfig)
class ProMoERouter(Router):
    """The experts with the most similar prototypes, gated by the cosine; the last expert for tokens without a class."""

    weight: nn.Parameter

    def scores(self, x_ND: Tensor, context: RoutingContext | None = None) -> Scores:
        scores = super().scores(x_ND, context)
        prob_NE = F.pad(scores.prob_NE, (0, self.experts - len(self.weight)))
        return replace(scores, prob_NE=torch.where(self._no_class(scores), self._last(scores), prob_NE))

    def route(self, scores: Scores) -> Choice:
        cosine_NP, none_N1 = scores.score_NE, self._no_class(scores)
        mask_NP = best_experts(cosine_NP.detach(), min(int(self.target), len(self.weight)))
        rest = (0, self.experts - len(self.weight))
        mask_NE = torch.where(none_N1, self._last(scores).bool(), F.pad(mask_NP, rest))
        gate_NE = torch.where(none_N1, 1.0, F.pad(cosine_NP, rest))
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(gate_NE, mask_NE))

    def losses(self, scores: Scores, choice: Choice) -> dict[str, Tensor]:
        """Beside the others `contrastive`: each prototype should resemble the mean of its tokens, and no other mean."""
        own_NP = choice.mask_NE[:, : len(self.weight)] & ~self._no_class(scores)
        present_P = own_NP.any(0)
        mean_PD = own_NP.float().T[present_P] @ scores.x_ND  # of which cosines need no division by the counts
        prototype_PD = F.normalize(self.weight.float()[present_P], dim=-1)
        likeness_PP = prototype_PD @ F.normalize(mean_PD, dim=-1).T / TEMPERATURE
        loss_P = likeness_PP.logsumexp(-1) - likeness_PP.diagonal()
        return super().losses(scores, choice) | {"contrastive": loss_P.sum() / max(1, len(loss_P))}

    def _no_class(self, scores: Scores) -> Tensor:
        """Bool [N, 1]: tokens of samples that have the null class."""
        context, tokens = scores.context, len(scores.x_ND)
        if context.labels_B is None or context.null_label is None:
            return torch.zeros(tokens, 1, dtype=torch.bool, device=scores.x_ND.device)
        return context.by_token(context.labels_B == context.null_label, tokens)[:, None]

    def _last(self, scores: Scores) -> Tensor:
        """[E]: 1 for the expert of the tokens without a class."""
        return torch.arange(self.experts, device=scores.x_ND.device).eq(self.experts - 1).float()
