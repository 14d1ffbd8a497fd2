"""Expert choice: every expert takes its best tokens of an image (Zhou et al., arXiv 2202.09368; EC-DiT, 2410.02098).

So every expert has the same load, and a token has from none to all experts. An image sees no other one, which is legal
in diffusion, where a token may depend on later ones. With `input: unmodulated_time` and `renormalize: true` it is the
router of NucleusMoE-Image.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dit_moe.moe.routers.base import ROUTERS, Choice, Router, RouterConfig, Scores, Sees
from dit_moe.moe.routing import best_tokens, tokens_per_expert


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig(RouterConfig):
    """Each of E experts takes ⌊target·S/E⌋ of an image's S tokens, and at least one."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = "k"
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("bias_rate", "min_experts", "max_experts")

    renormalize: bool | None = False
    balance_loss: float = 0.0

    @property
    def sees(self) -> Sees:
        return "sample"

    def note(self, target: float, experts: int, tokens: int | None) -> str | None:
        taken = tokens_per_expert(tokens, experts, target) if tokens else 0
        if not tokens or abs(taken * experts / tokens - target) < 0.005 * target:
            return None
        what = f"each of {experts} experts takes {taken} of the {tokens} tokens of an image, so a token has"
        return f"model.moe.target={target:g}: {what} {taken * experts / tokens:.3g} experts on average"


@ROUTERS.register("expert_choice", ExpertChoiceConfig)
class ExpertChoiceRouter(Router):
    """For each expert the tokens of an image with its highest scores; the gates are the scores."""

    def route(self, scores: Scores) -> Choice:
        mask_NE = best_tokens(scores.score_NE.detach(), self.k, scores.context.samples)
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE))
