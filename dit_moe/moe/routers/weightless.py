"""What routers share that choose k of E experts and of W more without weights, which cost no compute.

A token that chooses one of those uses an expert less, so the mean of active experts follows from k and W once the load
is balanced: a budget without a controller.
"""

# N tokens, E experts, W without weights, R = E + W rows of scores

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dit_moe.config import require
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import Router, RouterConfig, Score
from dit_moe.moe.routing import best_experts

NEAR = 0.01  # of the target: how far the mean of active experts at balance may be from it


@dataclass(frozen=True, kw_only=True)
class WeightlessConfig(RouterConfig):
    """k, and how many experts have no weights, follow from the target where they are left open."""

    SCORES: ClassVar[tuple[Score, ...]] = ("softmax", "sigmoid")
    MAY_SKIP: ClassVar[bool] = True
    UNUSED: ClassVar[tuple[str, ...]] = ("bias_rate", "min_experts", "max_experts")

    renormalize: bool | None = True
    balance_loss: float = 1e-2  # the budget needs a balanced load
    k: int | None = None  # choices of a token; None: see `weightless`

    @property
    def weightless(self) -> int | None:
        """W; None: together with k such that the mean of active experts is the target, no fewer than `fewest`."""
        raise NotImplementedError

    def having(self, weightless: int) -> Self:
        """With W decided."""
        raise NotImplementedError

    def fewest(self, experts: int) -> int:
        """The least W that is chosen."""
        raise NotImplementedError

    def weight(self) -> float:
        """Of experts without weights in the balance loss, where the others have 1."""
        return 1.0

    def active(self, experts: int, k: int, weightless: int) -> float:
        """Mean number of active experts per token at balance, which is where all have the same weighted load."""
        return experts if k == experts + weightless else k * experts / (experts + weightless / self.weight())

    def resolved(self, experts: int, target: float) -> Self:
        own, found = super().resolved(experts, target), []
        fewest = self.fewest(experts)
        for weightless in range(fewest, fewest + 2 * experts + 1) if self.weightless is None else [self.weightless]:
            nearest = round(target / experts * (experts + weightless / self.weight()))
            k = self.k or min(max(1, nearest), experts + weightless)
            off = abs(self.active(experts, k, weightless) / target - 1)
            found.append((off if off > NEAR else 0, weightless, k))
        _, weightless, k = min(found)
        return replace(own.having(weightless), k=k)

    def check(self, experts: int, target: float) -> None:
        super().check(experts, target)
        own = self.resolved(experts, target)
        assert own.k is not None and own.weightless is not None
        rows = experts + own.weightless
        require(1 <= own.k <= rows, own, "k", f"must be from 1 to {rows}, of which {experts} have weights")
        active = own.active(experts, own.k, own.weightless)
        wanted = f"of {rows}, of which {experts} have weights, keeps {active:.4g} active and not target={target:g}"
        require(abs(active / target - 1) <= NEAR, own, "k", f"{wanted}; leave k open, or set that target")

    def rows(self, experts: int) -> int:
        assert self.weightless is not None, "resolved before"
        return experts + self.weightless


class WeightlessRouter(Router):
    """Top-k of all rows; `select` and `gates` are over [N, R]."""

    config: WeightlessConfig
    weight: nn.Parameter
    load_W: Tensor

    def __init__(self, config: WeightlessConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        rows = self.config.rows(experts)
        # Shares of all choices, of which `load_E` has only those among the experts with weights.
        self.register_buffer("load_W", torch.full((rows - experts,), 1 / rows))

    @property
    def observed(self) -> int:
        return self.config.rows(self.experts) - self.experts  # choices of each expert without weights

    @property
    def most(self) -> int:
        assert self.config.k is not None
        return min(self.config.k, self.experts)

    def select(self, score_NR: Tensor) -> Tensor:
        assert self.config.k is not None
        # Of NaN the best may all be without weights, which would hide it.
        return best_experts(score_NR, self.config.k) | score_NR.isnan()

    def load(self) -> Tensor:
        """[R], of the optimizer step before: each expert's share of all choices."""
        return torch.cat([self.load_E * (1 - self.load_W.sum()), self.load_W])

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        assert self.config.k is not None
        load_W = (own.observed_K / self.config.k).to(self.load_W.dtype)
        self.load_W.copy_(torch.where(load_W.isnan(), self.load_W, load_W))
