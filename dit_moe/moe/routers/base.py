"""What every router shares: fp32 logits, dynamic routing normalization, gates, losses and statistics.

A new router is a config dataclass and a class with one method, `select`; see `topk.py` for the smallest one.
"""

# N tokens, D width, E experts

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.config import ConfigError, require
from dit_moe.moe.router_stats import RouterStats, balance_loss, dynamic_loss, z_loss
from dit_moe.moe.routing import Routing, routing_from_mask
from dit_moe.registry import Registry

ROUTERS = Registry("router")
DRN_EPS = 1e-3  # added to the standard deviation of a token's logits: bounds the gradient of one whose logits are equal
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Options of every router. A loss term `name` of a router is weighted by the option ``name_loss``."""

    ADJUSTABLE: ClassVar[Literal["p", "k"] | None] = None
    """What can be set anew in a trained router, so that a token uses more or fewer experts. With "p" the router is a
    `TopPRouter`."""

    drn: bool = False  # dynamic routing normalization: standardised logits times a learnable scale
    # Gates of the chosen experts sum to 1; with False they are the raw probabilities. None: they sum to 1 unless a
    # token has one expert: its gate would be 1 whatever the router says, and the task could teach the router nothing.
    renormalize: bool | None = None
    min_experts: int = 1
    max_experts: int | None = None  # None: all
    balance_loss: float = 1e-4
    dynamic_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        require(self.min_experts >= 1, self, "min_experts", "must be at least 1")
        if self.max_experts is not None:
            require(
                self.max_experts >= self.min_experts, self, "max_experts", f"is below min_experts={self.min_experts}"
            )

    @property
    def controlled(self) -> bool:
        """Whether training holds the mean of active experts at the target by moving something."""
        return False

    def check(self, experts: int, target: float) -> None:
        """Raise ConfigError unless these options make sense for `experts` experts and a mean of `target` active."""
        for field in ("min_experts", "max_experts"):
            require((getattr(self, field) or 0) <= experts, self, field, f"exceeds experts={experts}")
        most = self.max_experts or experts
        if not self.min_experts <= target <= most:
            raise ConfigError("target", f"={target:g} is outside what the router allows, {self.min_experts} to {most}")

    def resolved(self, experts: int, target: float) -> Self:
        """With what is left open decided for `experts` experts and a mean of `target` active."""
        if self.renormalize is not None:
            return self
        return replace(self, renormalize=min(target, self.max_experts or experts) > 1)

    def note(self, target: float) -> str | None:
        """What a user should know before training with a mean of `target` active experts; None: nothing unusual."""
        return None


class Router(nn.Module):
    """Token states → Routing. Subclasses choose the experts in `select`; everything here is theirs to use.

    Args:
        config: the router's options.
        width: D of the token states.
        experts: E.
        target: mean number of active experts per token that the model is built for.
    """

    load_E: Tensor
    override: float | None = None  # of the trained threshold (as u), or of k; no part of the state. See `ComputeBudget`

    def __init__(self, config: RouterConfig, width: int, experts: int, target: float) -> None:
        super().__init__()
        config.check(experts, target)
        self.config, self.experts, self.target = config.resolved(experts, target), experts, target
        self.most = config.max_experts or experts
        self.weight = nn.Parameter(torch.empty(experts, width))
        # One element and not a scalar: sharded data parallelism cuts every parameter along its first dimension.
        self.theta = nn.Parameter(torch.ones(1)) if config.drn else None
        # f of the balance loss: the load of the optimizer step before, over all ranks and micro-batches.
        self.register_buffer("load_E", torch.full((experts,), 1 / experts))
        self.stats = RouterStats(experts)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small, as in OLMoE, so that what the router learns soon outweighs what it began with."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def probabilities(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits and expert probabilities, both [N, E] in fp32 whatever autocast says. DTop-p, steps 1 and 2."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
            if self.theta is None:
                return logits_NE, logits_NE.softmax(-1)
            centred_NE = logits_NE - logits_NE.mean(-1, keepdim=True)
            # Not std(): the norm has a finite gradient, 0, where all logits of a token are equal.
            std_N1 = torch.linalg.vector_norm(centred_NE, dim=-1, keepdim=True) / math.sqrt(self.experts)
            return logits_NE, (self.theta.float() / (std_N1 + DRN_EPS) * centred_NE).softmax(-1)

    def select(self, prob_NE: Tensor) -> Tensor:
        """Bool [N, E]: the experts of each token. Depends on the token's own row alone."""
        raise NotImplementedError

    def choose(self, prob_NE: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `select` says and, from routers with a controlled threshold, `PIController.slope`."""
        return self.select(prob_NE), None

    def forward(self, x_ND: Tensor) -> Routing:
        logits_NE, prob_NE = self.probabilities(x_ND)
        mask_NE, slope = self.choose(prob_NE.detach())
        gate_NE = prob_NE * mask_NE
        if self.config.renormalize:
            gate_NE = gate_NE / gate_NE.sum(-1, keepdim=True)
        aux = {}
        if self.training:
            aux = self.losses(logits_NE, prob_NE)
            if not len(x_ND):  # the mean of no tokens is NaN
                aux = {name: logits_NE.sum() for name in aux}
            self.stats.add(mask_NE, prob_NE.detach(), slope)
        return routing_from_mask(mask_NE, gate_NE, aux)

    def losses(self, logits_NE: Tensor, prob_NE: Tensor) -> dict[str, Tensor]:
        """The unweighted loss terms of this layer by name, means over its tokens."""
        return {
            # With last step's load as f the loss is linear in the batch: micro-batches and ranks add up exactly.
            "balance": balance_loss(self.load_E, prob_NE.mean(0)),
            "dynamic": dynamic_loss(prob_NE),
            "z": z_loss(logits_NE),
        }

    def loss_weights(self) -> dict[str, float]:
        """The coefficient of each term: the config option called like the term with ``_loss`` behind it."""
        return {
            option.removesuffix("_loss"): weight
            for option, weight in vars(self.config).items()
            if option.endswith("_loss")
        }

    @torch.no_grad()
    def after_step(self, own: RouterStats, model: RouterStats) -> None:
        """Once per optimizer step, with the counts of this layer and of all MoE layers, reduced over ranks."""
        self.load_E.copy_(torch.where(own.load_E.isnan(), self.load_E, own.load_E))
