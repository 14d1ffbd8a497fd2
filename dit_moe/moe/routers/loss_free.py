"""Loss-free balancing (Wang et al., arXiv 2408.15664; DeepSeek-V3): top-k whose load a bias evens, and no loss."""

from __future__ import annotations

from dataclasses import dataclass

from dit_moe.moe.routers.base import ROUTERS, Score
from dit_moe.moe.routers.topk import TopKConfig, TopKRouter


@dataclass(frozen=True, kw_only=True)
class LossFreeConfig(TopKConfig):
    """What is published, as options of top-k; `topk`, `topp`, `dtopp` and `seq_topk` may have a `bias_rate`, too."""

    score: Score = "sigmoid"
    bias_rate: float = 1e-3
    balance_loss: float = 0.0


@ROUTERS.register("loss_free", LossFreeConfig)
class LossFreeRouter(TopKRouter):
    """The k experts with the highest score + bias, weighted by their scores without it; for k > 1 gates sum to 1.

    After every step each expert's bias moves by `bias_rate`: up if its load was below the mean, down if above.
    """
