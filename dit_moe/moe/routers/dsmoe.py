"""DSMoE (EfficientMoE): DeepSeek-V3's router as its diffusion transformers were released, in which the bias stays 0."""

from __future__ import annotations

from dataclasses import dataclass

from dit_moe.moe.routers.base import ROUTERS, Score
from dit_moe.moe.routers.topk import TopKConfig, TopKRouter


@dataclass(frozen=True, kw_only=True)
class DSMoEConfig(TopKConfig):
    """Nothing balances the load. `gate_scale` is 2.0 in the models of 16 experts and 2.5 in those of 48."""

    score: Score = "sigmoid"
    gate_scale: float = 2.0
    balance_loss: float = 0.0


@ROUTERS.register("dsmoe", DSMoEConfig)
class DSMoERouter(TopKRouter):
    """The k experts with the highest sigmoid, weighted by it; for k > 1 the weights of a token sum to `gate_scale`."""
