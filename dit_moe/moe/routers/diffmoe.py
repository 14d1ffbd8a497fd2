"""DiffMoE (Shi et al., arXiv 2503.14487): experts take their best tokens of the whole batch in training.

So noisy images, which are harder, may get more experts than others. In evaluation a small network that has learned the
choice predicts it token by token, against a threshold for each expert.
"""

# N tokens, E experts

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from dit_moe.config import require
from dit_moe.moe.routers.base import ROUTERS, Choice, Scores
from dit_moe.moe.routers.thresholds import ThresholdConfig, ThresholdRouter
from dit_moe.moe.routing import best_tokens, tokens_per_expert


@dataclass(frozen=True, kw_only=True)
class DiffMoEConfig(ThresholdConfig):
    """Each of E experts takes ⌊target·N/E⌋ of the N tokens that a process trains on at once, and at least one."""

    init_std: float = 0.006
    predictor_loss: float = 1.0
    predictor_bias: bool = False  # the predictor's two layers have biases, as published
    evaluation: Literal["token", "batch"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted = "is not supported: an image would depend on those sampled with it; drop it"
        require(self.evaluation == "token", self, "evaluation", wanted)

    def size(self, experts: int, width: int) -> tuple[int, int]:
        matrices, others = super().size(experts, width)
        read = self.input_width(width)
        biases = read + experts if self.predictor_bias else 0
        return matrices + read * read + experts * read, others + biases

    def saved(self, experts: int, width: int) -> float:
        """The predictor's too: its hidden layer before and after the activation, its logits and what they are to be."""
        return super().saved(experts, width) + 8 * self.input_width(width) + 8 * experts


@ROUTERS.register("diffmoe", DiffMoEConfig)
class DiffMoERouter(ThresholdRouter):
    """Expert choice over the batch, and the predictor that stands in for it in evaluation."""

    config: DiffMoEConfig

    def __init__(self, config: DiffMoEConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        read = config.input_width(width)
        self.predictor_in = nn.Parameter(torch.randn(read, read) / math.sqrt(read))
        self.predictor_out = nn.Parameter(torch.randn(experts, read) / math.sqrt(read))
        self.predictor_bias_in = nn.Parameter(torch.zeros(read)) if config.predictor_bias else None
        self.predictor_bias_out = nn.Parameter(torch.zeros(experts)) if config.predictor_bias else None

    def route(self, scores: Scores) -> Choice:
        biases = self.predictor_bias_in, self.predictor_bias_out
        bias_in, bias_out = (None if bias is None else bias.float() for bias in biases)
        hidden_ND = F.silu(F.linear(scores.x_ND.detach(), self.predictor_in.float(), bias_in))
        logits_NE = F.linear(hidden_ND, self.predictor_out.float(), bias_out)
        chance_NE = logits_NE.detach().sigmoid()
        if not self.training:
            mask_NE = ~(chance_NE <= self.threshold_K)  # true where it is NaN
            return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE))
        mask_NE = best_tokens(scores.score_NE.detach(), self.target)
        last = tokens_per_expert(len(chance_NE), self.experts, self.target) - 1
        threshold_E = chance_NE.sort(dim=0, descending=True).values[last : last + 1].sum(0)  # 0 if there are no tokens
        return Choice(
            mask_NE=mask_NE,
            gate_NE=self.gates(scores.score_NE, mask_NE),
            observed_K=len(chance_NE) * threshold_E,
            losses={"predictor": F.binary_cross_entropy_with_logits(logits_NE, mask_NE.float())},
        )
