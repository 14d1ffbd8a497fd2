"""Numbers computed from the routing of one layer: router losses, and the sums that are kept over an optimizer step.

A loss is a pure function to an unweighted scalar. Each is added to the training loss with a coefficient of the router's
config (`balance_loss`, `dynamic_loss`, …).
"""

# N tokens, E experts, K sums of a router's own

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(load_E: Tensor, prob_E: Tensor) -> Tensor:
    """E · Σ_i f_i · P_i (Switch Transformer): 1 for a balanced router, E for one that uses a single expert.

    `load_E` is f, the share of routed pairs that goes to each expert; it sums to 1 and has no gradient.
    `prob_E` is P, the mean probability of each expert over the tokens.
    """
    return load_E.numel() * (load_E * prob_E).sum()


def entropy(prob_NE: Tensor) -> Tensor:
    """Entropy of each token's expert distribution in nats, [N]. Its mean is the dynamic loss of Huang et al. 2024."""
    return -(prob_NE * (prob_NE + 1e-20).log()).sum(-1)


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean squared log-partition of the raw logits (ST-MoE). DTop-p leaves it at 0: it flattens the router."""
    return logits_NE.logsumexp(-1).square().mean()


def similarity_loss(prob_NE: Tensor, mask_NE: Tensor) -> Tensor:
    """ΣW∘PᵀP / N (Expert Race): 1 if all probabilities are equal, and the more the likelier are experts used together.

    With M = maskᵀmask, W is M divided on the diagonal by its mean there, and outside of it by its mean there.
    """
    used_NE = mask_NE.to(prob_NE.dtype)
    together_EE, experts = used_NE.T @ used_NE, mask_NE.shape[1]
    on_EE = together_EE.diagonal().diag()
    off_EE = together_EE - on_EE
    on_EE = experts * on_EE / on_EE.sum().clamp(min=1)
    off_EE = experts * (experts - 1) * off_EE / off_EE.sum().clamp(min=1)
    return ((on_EE + off_EE) * (prob_NE.T @ prob_NE)).sum() / len(prob_NE)


class RouterStats:
    """Running sums over the tokens that passed a router in training: a float64 vector that ranks can add up.

    Read once per optimizer step, by the threshold's controller and the log. Only ratios are ever taken, so a forward
    pass that runs twice (activation recompute) changes nothing. Not a buffer: each process counts its own tokens, and a
    resumed run starts its step over.

    Args:
        experts: E.
        observed: K, how many sums the router adds for its own use.
    """

    def __init__(self, experts: int, observed: int = 0, sums: Tensor | None = None) -> None:
        self.experts, self.observed = experts, observed
        # [tokens, pairs, pairs², entropy, dropped, pairs_E, probability_E, observed_K]; None while nothing was counted
        self.sums = sums

    def add(
        self,
        mask_NE: Tensor,
        prob_NE: Tensor,
        observed_K: Tensor | None = None,
        entropy_N: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> None:
        """Count the routing `mask_NE` of tokens with expert probabilities `prob_NE`.

        `observed_K` are sums over these tokens that the router wants back in `after_step`; `entropy_N` is that of
        `prob_NE` if it is known already; `dropped` of the pairs are not computed, for want of room.
        """
        active_N = mask_NE.sum(-1, dtype=torch.float64)
        entropy_N = (entropy(prob_NE) if entropy_N is None else entropy_N).to(torch.float64)
        tokens = active_N.new_full((), len(active_N))
        dropped = torch.zeros_like(tokens) if dropped is None else dropped.to(torch.float64)
        scalars = torch.stack([tokens, active_N.sum(), active_N.square().sum(), entropy_N.sum(), dropped])
        observed_K = active_N.new_zeros(self.observed) if observed_K is None else observed_K.to(torch.float64)
        assert len(observed_K) == self.observed, "of the length that the router's `observed` says"
        by_expert = mask_NE.sum(0, dtype=torch.float64), prob_NE.sum(0, dtype=torch.float64)
        new = torch.cat([scalars, *by_expert, observed_K])
        self.sums = new if self.sums is None else self.sums + new

    def vector(self, device: torch.device) -> Tensor:
        """The sums; zeros on `device` while nothing was counted."""
        if self.sums is not None:
            return self.sums
        return torch.zeros(5 + 2 * self.experts + self.observed, dtype=torch.float64, device=device)

    def reset(self) -> None:
        self.sums = None

    def _get(self, index: int | slice) -> Tensor:
        assert self.sums is not None, "nothing was counted"
        return self.sums[index]

    @property
    def active(self) -> Tensor:
        """Mean number of active experts per token; NaN if none passed."""
        return self._get(1) / self._get(0)

    @property
    def active_std(self) -> Tensor:
        """Its standard deviation over tokens."""
        return (self._get(2) / self._get(0) - self.active.square()).clamp(min=0).sqrt()

    @property
    def entropy(self) -> Tensor:
        """Mean entropy of the tokens' expert distribution, nats."""
        return self._get(3) / self._get(0)

    @property
    def dropped(self) -> Tensor:
        """Mean number of experts per token that were dropped, as a list of pairs had a fixed length."""
        return self._get(4) / self._get(0)

    @property
    def load_E(self) -> Tensor:
        """Share of the routed pairs that each expert got; sums to 1. NaN if there were none."""
        return self._get(slice(5, 5 + self.experts)) / self._get(1)

    @property
    def prob_E(self) -> Tensor:
        """Mean probability of each expert."""
        return self._get(slice(5 + self.experts, 5 + 2 * self.experts)) / self._get(0)

    @property
    def observed_K(self) -> Tensor:
        """Mean per token of what the router observed for its own use."""
        return self._get(slice(5 + 2 * self.experts, None)) / self._get(0)

    @property
    def balance(self) -> Tensor:
        """E · Σ f·P of these counts: 1 is balanced, E is collapsed."""
        return balance_loss(self.load_E, self.prob_E)
