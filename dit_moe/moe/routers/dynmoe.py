"""DynMoE (Guo et al., arXiv 2405.14297), top-any gating: each expert has a learned threshold of its own.

Without the published addition and removal of experts during training.
"""

# N tokens, D width, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_moe.moe.routers.base import ROUTERS, Choice, Router, RouterConfig, Score, Scores


@dataclass(frozen=True, kw_only=True)
class DynMoEConfig(RouterConfig):
    """The model's target sizes its experts; nothing holds the router to it."""

    SCORES: ClassVar[tuple[Score, ...]] = ("cosine",)
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("bias_rate", "min_experts", "max_experts")

    score: Score = "cosine"
    renormalize: bool | None = True
    balance_loss: float = 0.0
    diversity_loss: float = 1e-2  # both weights are ours
    simplicity_loss: float = 1e-2

    @property
    def held(self) -> bool:
        return False

    def peak(self, experts: int, target: float) -> float:
        """Half of the cosines are above 0 before training; 200 steps on the digits showed up to 5.9 of 8."""
        return max(target, 0.75 * experts)

    def note(self, target: float, experts: int, tokens: int | None) -> str | None:
        if experts / 2 <= target:
            return None
        start = f"training begins with about {experts / 2:g} of {experts} experts per token"
        return f"model.moe.target={target:g}: {start}, and nothing brings them to the target"

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        return matrices, others + experts


@ROUTERS.register("dynmoe", DynMoEConfig)
class DynMoERouter(Router):
    """Every expert whose score exceeds its threshold, all with the same gate."""

    weight: nn.Parameter

    def __init__(self, config: DynMoEConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.threshold_E = nn.Parameter(torch.zeros(experts))

    def route(self, scores: Scores) -> Choice:
        margin_NE = scores.score_NE.sigmoid() - self.threshold_E.float().sigmoid()
        mask_NE = ~(margin_NE <= 0)  # true where it is NaN
        if not self.training:
            best_NE = torch.zeros_like(mask_NE).scatter(-1, scores.score_NE.argmax(-1, keepdim=True), True)
            mask_NE = torch.where(mask_NE.any(-1, keepdim=True), mask_NE, best_NE)
        gate_NE = mask_NE + (margin_NE - margin_NE.detach())  # straight-through: 1, with the gradient of the margin
        if self.config.renormalize:  # by a number and not by the gates, so that the gate of a single expert learns
            gate_NE = gate_NE / mask_NE.sum(-1, keepdim=True).clamp(min=1)
        return Choice(mask_NE=mask_NE, gate_NE=gate_NE * self.config.gate_scale)

    def losses(self, scores: Scores, choice: Choice) -> dict[str, Tensor]:
        """Beside the others `diversity`, ‖W·Wᵀ − I‖, and `simplicity`, the mean norm of W's rows."""
        weight_ED = self.weight.float()
        similarity_EE = weight_ED @ weight_ED.T - torch.eye(self.experts, device=weight_ED.device)
        own = {"diversity": similarity_EE.norm(), "simplicity": weight_ED.norm(dim=-1).mean()}
        return super().losses(scores, choice) | own
