"""Forced routing: an even load whatever the tokens hold, for timing and profiling."""

# S tokens of one sample, N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_moe.moe.routers.base import ROUTERS, Choice, Router, RouterConfig, Score, Scores


@dataclass(frozen=True, kw_only=True)
class ForcedConfig(RouterConfig):
    """Gates are 1 over the number of the token's experts."""

    SCORES: ClassVar[tuple[Score, ...]] = ()
    UNUSED: ClassVar[tuple[str, ...]] = ("score", "input", "drn", "bias_rate", "balance_loss", "dynamic_loss", "z_loss")

    renormalize: bool | None = True
    balance_loss: float = 0.0

    def note(self, target: float, experts: int, tokens: int | None) -> str | None:
        return "model.moe.router=forced learns nothing and is for timing; for a model that is to be used choose dtopp"


@ROUTERS.register("forced", ForcedConfig)
class ForcedRouter(Router):
    """Token s of a sample uses the experts s·T, s·T + 1, …, modulo E, up to and without (s + 1)·T.

    With a target T that is no whole number, ⌊s·T⌋ up to ⌊(s + 1)·T⌋: the mean over a sample is T, rounded down to a
    whole number of pairs.
    """

    def route(self, scores: Scores) -> Choice:
        score_NE, samples = scores.score_NE, max(1, scores.context.samples)
        s_N1 = torch.arange(len(score_NE) // samples, device=score_NE.device).repeat(samples)[:, None]
        # To a millionth: 10 · 1.1 is a little more than 11 in floating point, and 3 · (1/3) a little less than 1.
        first_N1, next_N1 = ((place_N1.double() * self.target + 1e-6).floor() for place_N1 in (s_N1, s_N1 + 1))
        expert_E = torch.arange(self.experts, device=score_NE.device)
        mask_NE = (expert_E - first_N1) % self.experts < next_N1 - first_N1
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(score_NE, mask_NE))
