"""MoE++ (Jin et al., arXiv 2410.07348): top-k of experts and of zero, copy and constant experts, scored with memory.

k and the number of constant experts follow from the target, and experts have no capacity.
"""

# N tokens, D width, E experts, C constant experts, W without weights, R = E + W rows of scores

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.routers.base import ROUTERS, Choice, Scores
from dit_moe.moe.routers.weightless import WeightlessConfig, WeightlessRouter
from dit_moe.moe.routing import RoutingContext


@dataclass(frozen=True, kw_only=True)
class MoEPPConfig(WeightlessConfig):
    """At balance k·E/(E + W/tau) experts of a token are active."""

    zero_experts: int = 1  # nothing
    copy_experts: int = 1  # the token itself
    constant_experts: int | None = None  # a mixture of token and learned vector; None: as many as make the target
    tau: float = 0.75  # weight of experts without weights in the balance loss: below 1 they get more tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("zero_experts", "copy_experts", "constant_experts"):
            require((getattr(self, name) or 0) >= 0, self, name, "must be at least 0")
        require(self.tau > 0, self, "tau", "must be above 0")

    @property
    def weightless(self) -> int | None:
        constant = self.constant_experts
        return None if constant is None else self.zero_experts + self.copy_experts + constant

    def having(self, weightless: int) -> Self:
        return replace(self, constant_experts=weightless - self.zero_experts - self.copy_experts)

    def fewest(self, experts: int) -> int:
        return self.zero_experts + self.copy_experts + 1

    def weight(self) -> float:
        return self.tau

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        constants = (self.constant_experts or 0) * width
        return matrices + self.rows(experts) ** 2 + 2 * constants, others + constants


@ROUTERS.register("moepp", MoEPPConfig)
class MoEPPRouter(WeightlessRouter):
    """The k best of all; what those without weights give is added to the output."""

    config: MoEPPConfig

    def __init__(self, config: MoEPPConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        rows, constants = len(self.weight), self.config.constant_experts or 0
        std = config.init_std
        self.residual = nn.Parameter(std * torch.randn(rows, rows))  # W_g, of the scores of the MoE layer before
        self.constant = nn.Parameter(std * torch.randn(constants, width)) if constants else None  # v
        self.mix = nn.Parameter(std * torch.randn(2 * constants, width)) if constants else None  # W_c

    def logits(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        logits_NR = super().logits(x_ND, context)
        # In the first layer zeros, so that every parameter takes part in every layer.
        earlier_NR = torch.zeros_like(logits_NR) if context.earlier_NE is None else context.earlier_NE
        return logits_NR + F.linear(earlier_NR, self.residual.float())

    def route(self, scores: Scores) -> Choice:
        mask_NR = self.select(scores.score_NE.detach())
        zero, copy = self.experts + self.config.zero_experts, self.config.copy_experts
        counts_NR = mask_NR.clone()
        counts_NR[:, self.experts : zero] = False
        gate_NR = self.gates(scores.score_NE, counts_NR)
        token_ND = scores.token_ND.float()
        added_ND = gate_NR[:, zero : zero + copy].sum(-1, keepdim=True) * token_ND
        if self.constant is not None and self.mix is not None:
            share_NC2 = F.linear(token_ND, self.mix.float()).unflatten(-1, (-1, 2)).softmax(-1)
            of_token_NC, of_constant_NC = (gate_NR[:, zero + copy :, None] * share_NC2).unbind(-1)
            added_ND = added_ND + of_token_NC.sum(-1, keepdim=True) * token_ND + of_constant_NC @ self.constant.float()
        return Choice(
            mask_NE=mask_NR[:, : self.experts],
            gate_NE=gate_NR[:, : self.experts],
            observed_K=mask_NR[:, self.experts :].sum(0),
            added_ND=added_ND,
            handed_on_NE=scores.logits_NE,
        )

    def load(self) -> Tensor:
        weight_R = torch.ones(len(self.weight), device=self.load_W.device)
        weight_R[self.experts :] = self.config.tau
        return super().load() * weight_R
