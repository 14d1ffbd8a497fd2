"""What every router shares: scores in fp32, dynamic routing normalization, gates, losses, statistics and the bias.

A new router is a config dataclass and a class. The smallest has one method, `select`; see `topk.py`. Where gates are
not the scores of the chosen experts, or more than a token's own scores decides, it has `route` in its place.
"""

# B samples, S tokens of one sample, N = B·S tokens, D width, E experts

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_moe.moe.router_stats import RouterStats, balance_loss, entropy, z_loss
from dit_moe.moe.routers.config import ROUTERS, RouterConfig, Score, Sees
from dit_moe.moe.routing import Routing, RoutingContext, routing_from_mask

__all__ = ["ROUTERS", "Choice", "Router", "RouterConfig", "Score", "Scores", "Sees"]  # what a router's file needs

DRN_EPS = 1e-3  # added to the standard deviation of a token's logits: bounds the gradient of one whose logits are equal
TINY = 1e-20  # a token's gates are divided by no less, so that one without experts has gates of 0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a router makes of its tokens before it chooses, all in fp32 whatever autocast says."""

    token_ND: Tensor  # what the experts read, in whatever dtype
    x_ND: Tensor  # what the router reads
    context: RoutingContext
    logits_NE: Tensor
    score_NE: Tensor  # the logits through dynamic routing normalization, if it is on, and the score function
    prob_NE: Tensor  # the scores as a distribution over experts, for losses and statistics

    # Of `entropy_N`: until Python 3.12 a cached_property takes a lock, which torch.compile cannot.
    _computed: list[Tensor] = field(default_factory=list, init=False)

    @property
    def entropy_N(self) -> Tensor:
        """Of each token's distribution, in nats; computed once."""
        if not self._computed:
            self._computed.append(entropy(self.prob_NE))
        return self._computed[0]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The experts of each token, and what comes with them."""

    mask_NE: Tensor  # bool
    gate_NE: Tensor  # fp32 with gradient; counts where the mask is true
    counted_NE: Tensor | None = None  # bool, the experts that count as active where others are computed too; None: all
    observed_K: Tensor | None = None  # sums over the tokens for `Router.after_step`, see `RouterStats`
    added_ND: Tensor | None = None  # see `Routing`
    handed_on_NE: Tensor | None = None  # see `Routing`
    losses: dict[str, Tensor] = field(default_factory=dict)  # unweighted terms that need what only `route` knows


class Router(nn.Module):
    """Token states → Routing. Subclasses choose the experts in `select` or `route`; everything here is theirs to use.

    Args:
        config: the router's options.
        width: D of the token states.
        experts: E.
        target: mean number of active experts per token that the model is built for.
    """

    wants_target: bool = False
    """Whether it learns from `RoutingContext.target_NF`."""
    load_E: Tensor
    bias_E: Tensor
    override: float | None = None  # of the trained threshold (as u), or of k; no part of the state. See `ComputeBudget`
    capacity_factor: float | None = None  # see `MoEConfig`

    def __init__(self, config: RouterConfig, width: int, experts: int, target: float) -> None:
        super().__init__()
        config.check(experts, target)
        self.config, self.experts, self.target = config.resolved(experts, target), experts, target
        rows = self.config.rows(experts)
        self.weight = nn.Parameter(torch.empty(rows, config.input_width(width))) if rows else None
        # One element and not a scalar: sharded data parallelism cuts every parameter along its first dimension.
        self.theta = nn.Parameter(torch.ones(1)) if config.drn else None
        # f of the balance loss: the load of the optimizer step before, over all ranks and micro-batches.
        self.register_buffer("load_E", torch.full((experts,), 1 / experts))
        if config.bias_rate:
            self.register_buffer("bias_E", torch.zeros(experts))
        self.stats = RouterStats(experts, self.observed)
        self.reset_parameters()

    @property
    def most(self) -> int:
        """The most experts that a token may have."""
        return self.config.max_experts or self.experts

    @property
    def observed(self) -> int:
        """K, the length of `Choice.observed_K`."""
        return 0

    def reset_parameters(self) -> None:
        """Small, as in OLMoE, so that what the router learns soon outweighs what it began with."""
        if self.weight is not None:
            nn.init.normal_(self.weight, std=self.config.init_std)

    # -------------------------------------------------------------------------------------------------------- scoring

    def scores(self, x_ND: Tensor, context: RoutingContext | None = None) -> Scores:
        """Of tokens [N, D]. DTop-p, steps 1 and 2."""
        context = context or RoutingContext()
        with torch.autocast(x_ND.device.type, enabled=False):
            token_ND, x_ND = x_ND, self.read(x_ND, context)
            logits_NE = self.logits(x_ND, context)
            normal_NE = logits_NE if self.theta is None else self.normalized(logits_NE, context)
            if self.config.score == "softmax":
                score_NE = prob_NE = normal_NE.softmax(-1)
            elif self.config.score == "sigmoid":
                score_NE = normal_NE.sigmoid()
                prob_NE = score_NE / score_NE.sum(-1, keepdim=True).clamp(min=TINY)
            else:
                score_NE, prob_NE = normal_NE, normal_NE.softmax(-1)
            return Scores(
                token_ND=token_ND,
                x_ND=x_ND,
                context=context,
                logits_NE=logits_NE,
                score_NE=score_NE,
                prob_NE=prob_NE,
            )

    def read(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """What the option `input` says the router reads, fp32."""
        if self.config.input == "token":
            return x_ND.float()
        assert context.unmodulated_ND is not None, "the block gave no unmodulated tokens"
        if self.config.input == "unmodulated":
            return context.unmodulated_ND.float()
        assert context.time_BD is not None, "the model gave no embedding of the time"
        time_ND = context.by_token(context.time_BD, len(x_ND))
        return torch.cat([time_ND.float(), context.unmodulated_ND.float()], dim=-1)

    def logits(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """[N, E] of what the router reads."""
        if self.weight is None:
            return x_ND.new_zeros(len(x_ND), self.experts)
        if self.config.score == "cosine":
            return F.linear(F.normalize(x_ND, dim=-1), F.normalize(self.weight.float(), dim=-1))
        return F.linear(x_ND, self.weight.float())

    def normalized(self, logits_NE: Tensor, context: RoutingContext) -> Tensor:
        """Dynamic routing normalization: mean 0 and standard deviation θ over the experts of each token."""
        assert self.theta is not None
        centred_NE = logits_NE - logits_NE.mean(-1, keepdim=True)
        # Not std(): the norm has a finite gradient, 0, where all logits of a token are equal.
        std_N1 = torch.linalg.vector_norm(centred_NE, dim=-1, keepdim=True) / math.sqrt(logits_NE.shape[-1])
        return self.theta.float() / (std_N1 + DRN_EPS) * centred_NE

    # ------------------------------------------------------------------------------------------------------- choosing

    def select(self, score_NE: Tensor) -> Tensor:
        """Bool [N, E]: the experts of each token. Depends on the token's own row alone."""
        raise NotImplementedError

    @property
    def k(self) -> float:
        """Of routers with ADJUSTABLE = "k": the experts per token to choose, the target's or a compute budget's."""
        return self.target if self.override is None else self.override

    def ranking(self, score_NE: Tensor) -> Tensor:
        """What experts are ranked by: the scores, and the bias of loss-free balancing."""
        return score_NE + self.bias_E if self.config.bias_rate else score_NE

    def gates(self, score_NE: Tensor, mask_NE: Tensor) -> Tensor:
        """The scores of the chosen experts, renormalised and scaled as the options say."""
        gate_NE = score_NE * mask_NE
        if self.config.renormalize:
            gate_NE = gate_NE / gate_NE.sum(-1, keepdim=True).clamp(min=TINY)
        return gate_NE if self.config.gate_scale == 1 else gate_NE * self.config.gate_scale

    def route(self, scores: Scores) -> Choice:
        """The experts that `select` chooses, weighted by `gates`."""
        mask_NE = self.select(scores.score_NE.detach())
        return Choice(mask_NE=mask_NE, gate_NE=self.gates(scores.score_NE, mask_NE))

    def capacity(self, x_ND: Tensor) -> int | None:
        """The length of the list of pairs of these tokens; None: that of all pairs, which the host waits for.

        In evaluation nothing is dropped, as an image would depend on those sampled with it. Where the host cannot
        wait, the list then has room for as many pairs as there could be.
        """
        if self.capacity_factor is None:
            return None
        if self.training:
            return min(math.ceil(len(x_ND) * self.target * self.capacity_factor), len(x_ND) * self.experts)
        compiling = torch.compiler.is_compiling()
        fixed = compiling or (x_ND.is_cuda and torch.cuda.is_current_stream_capturing())
        return len(x_ND) * self.most if fixed else None

    def forward(self, x_ND: Tensor, context: RoutingContext | None = None) -> Routing:
        scores = self.scores(x_ND, context)
        with torch.autocast(x_ND.device.type, enabled=False):
            choice = self.route(scores)
            prob_NE, weightless = scores.prob_NE.detach(), self.config.rows(self.experts) > self.experts
            if weightless:  # as a distribution over those with weights
                prob_NE = prob_NE[:, : self.experts]
                prob_NE = prob_NE / prob_NE.sum(-1, keepdim=True).clamp(min=TINY)
            capacity, dropped, aux = self.capacity(x_ND), None, {}
            if self.training:
                aux = self.losses(scores, choice) | choice.losses
                if not len(x_ND):  # the mean of no tokens is NaN
                    aux = {name: scores.logits_NE.sum() for name in aux}
                counted_NE = choice.mask_NE if choice.counted_NE is None else choice.counted_NE
                if capacity is not None:
                    dropped = (choice.mask_NE.sum() - capacity).clamp(min=0)
                entropy_N = None if weightless else scores.entropy_N.detach()
                self.stats.add(counted_NE, prob_NE, choice.observed_K, entropy_N, dropped)
            return routing_from_mask(
                choice.mask_NE,
                choice.gate_NE,
                aux,
                capacity,
                prob_NE=prob_NE,
                added_ND=choice.added_ND,
                handed_on_NE=choice.handed_on_NE,
            )

    # ------------------------------------------------------------------------------------------------------- training

    def losses(self, scores: Scores, choice: Choice) -> dict[str, Tensor]:
        """The unweighted loss terms of this layer by name, means over its tokens."""
        return {
            # With last step's load as f the loss is linear in the batch: micro-batches and ranks add up exactly.
            "balance": balance_loss(self.load(), scores.prob_NE.mean(0)),
            "dynamic": scores.entropy_N.mean(),
            "z": z_loss(scores.logits_NE),
        }

    def load(self) -> Tensor:
        """f of the balance loss for each of the `rows` of scores."""
        return self.load_E

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
        load_E = own.load_E
        if self.config.bias_rate:
            self.bias_E.add_(self.config.bias_rate * torch.sign(1 / self.experts - load_E).nan_to_num())
        self.load_E.copy_(torch.where(load_E.isnan(), self.load_E, load_E))

    def state_numbers(self) -> dict[str, Tensor]:
        """Scalars that say how the router stands, by name, for the log of training."""
        return {} if self.theta is None else {"theta": self.theta.detach()}
