"""DTop-p routing (Jin et al., arXiv 2512.13996): top-p whose threshold a PI controller steers to the target.

Global (the main method): one error for all layers, so that the normalization can move compute between layers.
Layer-wise: each layer holds the target by itself.
"""

# N tokens, E experts

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_moe.moe.control import ControllerConfig, PIController
from dit_moe.moe.router_stats import RouterStats
from dit_moe.moe.routers.base import ROUTERS, RouterConfig
from dit_moe.moe.routers.topp import TopPRouter
from dit_moe.moe.routing import prefix_mask


@dataclass(frozen=True, kw_only=True)
class DTopPConfig(RouterConfig):
    DIAL: ClassVar[Literal["p", "k"] | None] = "p"

    drn: bool = True
    dynamic_loss: float = 1e-3
    layerwise: bool = False
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    @property
    def controlled(self) -> bool:
        """A controller without gains leaves the threshold where it began."""
        return bool(self.controller.kp or self.controller.ki)

    def note(self, target: float) -> str | None:
        if target > 1 or not self.controlled:
            return None
        what = "the threshold falls until every token uses one expert"
        return f"model.moe.target=1: {what}; for dynamic routing use a target above 1"


@ROUTERS.register("dtopp", DTopPConfig)
class DTopPRouter(TopPRouter):
    """Top-p with a threshold of its own, moved after every optimizer step.

    In global mode the controllers of all layers see the same error and so stay equal, bit for bit.
    """

    config: DTopPConfig  # type: ignore[assignment]

    def __init__(self, config: DTopPConfig, width: int, experts: int, target: float) -> None:
        super().__init__(config, width, experts, target)
        self.controller = PIController(config.controller, target, experts)

    def trained_tail(self) -> Tensor:
        return self.controller.tail

    def trained_u(self) -> float:
        return self.controller.u.item()

    def choose(self, prob_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        left_NE, order_NE = self.ranked(prob_NE)
        slope = self.controller.slope(left_NE) if self.training else None
        return prefix_mask(left_NE, order_NE, tail=self.tail()), slope

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        super().after_step(own, model)
        counted = own if self.config.layerwise else model
        self.controller.step(counted.active, counted.slope)
