"""The Mixture-of-Experts feed-forward layer: a router, its experts, and optional shared experts."""

# B batch, S tokens of one sample, N = B·S tokens, D width

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_moe.config import ConfigError, require
from dit_moe.moe.activations import ACTIVATIONS, MATRICES, Activation
from dit_moe.moe.experts import Experts, Implementation
from dit_moe.moe.routers import ROUTERS, Router, RouterConfig
from dit_moe.moe.routers.dtopp import DTopPConfig
from dit_moe.moe.routing import Routing, RoutingContext


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which blocks are MoE and what is in them.

    By default the active compute equals the dense feed-forward's: each of the `target` active (and the shared) experts
    has 1/(target + shared_experts) of its hidden width.
    """

    # Both are None only until the model's name, or a ConfigError, resolves them.
    experts: int = None  # type: ignore[assignment]
    target: float = None  # type: ignore[assignment]  # mean number of active routed experts per token
    router: Annotated[RouterConfig, ROUTERS] = field(default_factory=DTopPConfig)
    expert_hidden: int | None = None  # hidden width of one expert; wins over granularity
    granularity: float | None = None  # dense hidden width / expert hidden width; None: target + shared_experts
    shared_experts: int = 0  # experts that every token uses, beside the routed ones
    shared_hidden: int | None = None  # hidden width of one shared expert; None: that of a routed one
    bias: bool = False  # experts, shared ones too, have biases
    activation: Activation | None = None  # None: that of the dense feed-forward
    implementation: Implementation = "auto"  # auto: see `fastest`
    recompute: bool = False  # compute the experts again in the backward pass, and keep none of their rows until then
    # Training computes at most this many times target·N of the pairs that the routers choose for N tokens, whichever
    # experts they go to, and drops the rest; the host then never waits for their number. None: all pairs.
    capacity_factor: float | None = None
    every: int = 1  # one block in this many is an MoE block …
    offset: int = 0  # … from this block on

    def __post_init__(self) -> None:
        named = "or left out where the model's name gives it"
        require(self.experts is None or self.experts >= 1, self, "experts", f"must be at least 1, {named}")
        require(self.target is None or self.target > 0, self, "target", f"must be above 0, {named}")
        for name in ("expert_hidden", "granularity", "shared_hidden"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "must be above 0")
        require(self.shared_experts >= 0, self, "shared_experts", "must be at least 0")
        used = self.shared_hidden is None or self.shared_experts > 0
        require(used, self, "shared_hidden", "means nothing with shared_experts=0; drop it, or give their number")
        if self.capacity_factor is not None:
            self._check_capacity(self.capacity_factor)
        require(self.every >= 1, self, "every", "must be at least 1")
        require(self.offset >= 0, self, "offset", "must be at least 0")
        if None in (self.experts, self.target):
            return
        wanted = f"exceeds experts={self.experts}; lower it or add experts"
        require(self.target <= self.experts, self, "target", wanted)
        try:
            self.router.check(self.experts, self.target)
        except ConfigError as error:
            raise error if error.path == "target" else error.below("router") from None
        object.__setattr__(self, "router", self.router.resolved(self.experts, self.target))

    def _check_capacity(self, factor: float) -> None:
        require(1 <= factor < math.inf, self, "capacity_factor", "must be at least 1")
        wanted = f"reads on the host how many pairs there are, which capacity_factor={factor:g} avoids"
        fixed = self.implementation in ("auto", "grouped")
        require(fixed, self, "implementation", f"{wanted}; drop one of the two")
        waits = f"is for routers that wait for nothing, and this one waits to learn {self.router.WAITS_FOR}"
        require(self.router.WAITS_FOR is None, self, "capacity_factor", f"{waits}; choose dtopp, or drop it")

    def is_moe(self, block: int) -> bool:
        """Whether block number `block`, counted from 0, has experts."""
        return block >= self.offset and (block - self.offset) % self.every == 0

    def hidden(self, dense_hidden: int, dense_activation: Activation = "gelu") -> int:
        """Hidden width of one expert beside a dense feed-forward of `dense_hidden`.

        SwiGLU has three matrices where GELU has two; widths round to multiples of 8 for the GEMMs.
        """
        if self.expert_hidden is not None:
            return self.expert_hidden
        width = dense_hidden / (self.granularity or self.target + self.shared_experts)
        width *= MATRICES[dense_activation] / MATRICES[self.activation or dense_activation]
        return max(8, 8 * round(width / 8))

    def shared_width(self, hidden: int) -> int:
        """Hidden width of all shared experts together, beside routed ones of `hidden`; 0 if there are none."""
        return self.shared_experts * (self.shared_hidden or hidden)


class FeedForward(nn.Module):
    """A feed-forward that every token meets: all shared experts as one, or a dense one."""

    def __init__(self, width: int, hidden: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(width, 2 * hidden if activation == "swiglu" else hidden, bias=bias)
        self.w_out = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(ACTIVATIONS[self.activation](self.w_in(x)))


class MoELayer(nn.Module):
    """Feed-forward with routed experts. In evaluation no router looks beyond the sample of a token.

    Args:
        config: the layer's options.
        width: D of the tokens.
        dense_hidden: hidden width of the dense feed-forward that it stands for, …
        dense_activation: … and that one's activation.
    """

    router: Router

    def __init__(self, config: MoEConfig, width: int, dense_hidden: int, dense_activation: Activation = "gelu") -> None:
        super().__init__()
        hidden, activation = config.hidden(dense_hidden, dense_activation), config.activation or dense_activation
        self.router = ROUTERS.build(config.router, width, config.experts, config.target)
        self.router.capacity_factor = config.capacity_factor
        self.experts = Experts(config.experts, width, hidden, activation, config.implementation, config.bias)
        shared = config.shared_width(hidden)
        self.shared = FeedForward(width, shared, activation, config.bias) if shared else None
        self.recompute = config.recompute

    def forward(
        self,
        x_BSD: Tensor,
        context: RoutingContext | None = None,
        earlier_NE: Tensor | None = None,
        unmodulated_BSD: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Returns the output in x's shape and the routing.

        Args:
            x_BSD: what the experts read; [N, D] are the tokens of a single sample.
            context: what the model knows of the samples; None: how many there are.
            earlier_NE: what the router of the MoE layer before handed on.
            unmodulated_BSD: the same tokens before the modulation by time and label.
        """
        compute = self._compute_uncompiled if self.router.capacity_factor is None else self._compute
        return compute(x_BSD, context, earlier_NE, unmodulated_BSD)

    def _compute(
        self,
        x_BSD: Tensor,
        context: RoutingContext | None,
        earlier_NE: Tensor | None,
        unmodulated_BSD: Tensor | None,
    ) -> tuple[Tensor, Routing]:
        x_ND = x_BSD.flatten(0, -2)
        context = replace(
            context or RoutingContext(samples=len(x_BSD) if x_BSD.ndim > 2 else 1),
            earlier_NE=earlier_NE,
            unmodulated_ND=None if unmodulated_BSD is None else unmodulated_BSD.flatten(0, -2),
        )
        routing = self.router(x_ND, context)
        if self.recompute and self.training:
            # No random numbers are drawn in there.
            out_ND = checkpoint(self.experts, x_ND, routing, use_reentrant=False, preserve_rng_state=False)
        else:
            out_ND = self.experts(x_ND, routing)
        if routing.added_ND is not None:
            out_ND = out_ND + routing.added_ND.to(out_ND.dtype)
        out_BSD = out_ND.view_as(x_BSD)
        if self.shared is not None:
            out_BSD = out_BSD + self.shared(x_BSD)
        return out_BSD, routing

    _compute_uncompiled = torch.compiler.disable(_compute)  # the number of routed pairs is known only when it runs
