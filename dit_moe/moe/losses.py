"""Router losses: pure functions from one layer's routing to a scalar, unweighted.

Each is added to the training loss with a coefficient of the router's config (`balance_loss`, `dynamic_loss`, `z_loss`).
"""

# N tokens, E experts

from __future__ import annotations

from torch import Tensor


def balance_loss(load_E: Tensor, prob_E: Tensor) -> Tensor:
    """E · Σ_i f_i · P_i (Switch Transformer): 1 for a balanced router, E for one that uses a single expert.

    `load_E` is f, the share of routed pairs that goes to each expert; it sums to 1 and has no gradient.
    `prob_E` is P, the mean probability of each expert over the tokens.
    """
    return load_E.numel() * (load_E * prob_E).sum()


def entropy(prob_NE: Tensor) -> Tensor:
    """Entropy of each token's expert distribution in nats, [N]."""
    return -(prob_NE * (prob_NE + 1e-20).log()).sum(-1)


def dynamic_loss(prob_NE: Tensor) -> Tensor:
    """Mean entropy (Huang et al. 2024): keeps a top-p router decided."""
    return entropy(prob_NE).mean()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean squared log-partition of the raw logits (ST-MoE). DTop-p leaves it at 0: it flattens the router."""
    return logits_NE.logsumexp(-1).square().mean()
